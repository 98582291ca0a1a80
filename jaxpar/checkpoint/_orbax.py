"""Everything that jaxpar asks of Orbax, and every file name of Orbax's that it knows.

Orbax's v1 interface is experimental and renames functions between minor series; only this module follows.
Orbax 0.12 writes outside of its root for some names, merges `{"a.b"}` with `{"a": {"b"}}`, and holds up the exit of the
process for five minutes after a save that it refused (an empty array, a relative path). So what it is given here is
always one flat dict, checked before, under one fixed name.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def write(path: pathlib.Path, arrays: Mapping[str, Any], about: Mapping[str, Any]) -> Callable[[float | None], None]:
    """Start to write `arrays` and the JSON object `about` to `path`, which does not exist.

    Returns once every array has been copied to host memory: it may be donated or changed then. What it returns waits,
    at most the seconds given (then `TimeoutError`), until the checkpoint is complete, and raises what went wrong.
    """
    from orbax.checkpoint import v1 as ocp

    return ocp.save_async(str(path), dict(arrays), custom_metadata=dict(about)).result


def read(path: pathlib.Path, targets: Mapping[str, jax.ShapeDtypeStruct | np.ndarray]) -> dict[str, Any]:
    """Read the arrays of `path`, each onto the sharding of its target, or into host memory if that is a NumPy array."""
    from orbax.checkpoint import v1 as ocp

    return ocp.load(str(path), dict(targets))


def about(path: pathlib.Path) -> dict[str, Any] | None:
    """The JSON object that was written with a checkpoint; `None` if `path` is not a complete one.

    A checkpoint becomes visible by one rename, so what is incomplete here was copied or deleted in part.
    """
    if not all((path / name).is_file() for name in ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt")):
        return None
    try:
        written = json.loads((path / "_CHECKPOINT_METADATA").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(written, dict) or not written.get("commit_timestamp_nsecs"):
        return None
    custom = written.get("custom_metadata")
    return custom if isinstance(custom, dict) else {}


def is_unfinished(name: str) -> bool:
    """Whether a directory called `name` is what a save leaves behind when its process is killed."""
    return ".orbax-checkpoint-tmp" in name
