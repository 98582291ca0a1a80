"""`checkpoint.json`: what a checkpoint holds, in one JSON file beside the arrays.

What each leaf is, Python numbers, the states of loaders, versions, metrics, what the caller adds, and the sizes of all
files. It is enough to list a directory, and to refuse a checkpoint of another program before any array is read.
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import CheckpointError
from . import _sums
from ._parts import Parts, is_key, plain_json

NAME = "checkpoint.json"
FORMAT = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """What is known of one leaf without its values.

    Attributes:
        kind: A dtype (`bfloat16`, `key<fry>`), or `a Python int`, or `the state of an object`.
        shape: Global; `None` unless it is an array.
        stored: Shape and dtype of the array in the store, where they are others: a PRNG key is kept as its bits.
    """

    kind: str
    shape: tuple[int, ...] | None = None
    stored: tuple[tuple[int, ...], str] | None = None

    def __str__(self) -> str:
        return self.kind if self.shape is None else f"{self.shape} {self.kind}"

    @property
    def is_floating(self) -> bool:
        """Whether it is an array of floating-point numbers."""
        return self.shape is not None and self.stored is None and jnp.issubdtype(jnp.dtype(self.kind), jnp.floating)

    def on_host(self) -> np.ndarray:
        """What to ask of the store for its bits in host memory."""
        shape, kind = self.stored or (self.shape or (), self.kind)
        return np.empty(shape, jnp.dtype(kind))

    @property
    def num_bytes(self) -> int:
        """Bytes of an array, unsharded; 0 for other leaves."""
        if self.shape is None:
            return 0
        shape, kind = self.stored or (self.shape, self.kind)
        return int(np.prod(shape, dtype=np.int64)) * jnp.dtype(kind).itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What `checkpoint.json` says.

    Attributes:
        leaves: Every leaf, by path.
        values: Python numbers, by path.
        states: What objects with `get_state` said, by path.
        versions: Of the libraries that decide which bits a step computes.
        metrics: Numbers to choose the best by.
        metadata: What the caller added.
        saved: When, in UTC.
        files: The size of every other file but `SHA256SUMS`.
    """

    leaves: Mapping[str, Leaf]
    values: Mapping[str, int | float | bool]
    states: Mapping[str, Any]
    versions: Mapping[str, str]
    metrics: Mapping[str, float]
    metadata: Mapping[str, Any]
    saved: str
    files: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def write(self, path: pathlib.Path) -> None:
        """Write the file into `path`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["leaves"] = {name: _leaf_to_json(leaf) for name, leaf in self.leaves.items()}
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in {"jaxpar": FORMAT, **fields}.items()]
        (path / NAME).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def read(path: pathlib.Path) -> About:
    """What is written about the checkpoint at `path`.

    Raises:
        CheckpointError: Another version of jaxpar wrote it, or something else.
        OSError: There is no such file.
        ValueError: It is not JSON.
    """
    written = json.loads((path / NAME).read_text(encoding="utf-8"))
    if not isinstance(written, dict) or written.get("jaxpar") != FORMAT:
        found = written.get("jaxpar") if isinstance(written, dict) else None
        raise CheckpointError(
            f"{path} was not written by this version of jaxpar.checkpoint (format {found}, this one reads {FORMAT}). "
            "Load it with what wrote it, and save it again."
        )
    fields: dict[str, Any] = {field.name: written.get(field.name) for field in dataclasses.fields(About)}
    wrong = [name for name, value in fields.items() if not isinstance(value, str if name == "saved" else dict)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: missing, or not what a checkpoint has there")
    fields["leaves"] = {name: _leaf_from_json(name, leaf) for name, leaf in fields["leaves"].items()}
    return About(**fields)


def checked(path: pathlib.Path) -> About:
    """As `read`, of a complete checkpoint, once the file has the bytes that were saved.

    Raises:
        CheckpointError: It has others.
    """
    if _sums.of_files(path, [NAME])[NAME] != (_sums.read(path) or {}).get(NAME):
        raise CheckpointError(
            f"{path} is damaged.\n{NAME}: other bytes than were saved (SHA-256)\n"
            "Copy it again from where it is whole, or choose another step."
        )
    return read(path)


def described(parts: Parts) -> dict[str, Leaf]:
    """Every leaf of a tree taken apart."""
    return {
        **{path: _described(leaf) for path, leaf in parts.arrays.items()},
        **{path: Leaf(kind=f"a Python {type(value).__name__}") for path, value in parts.values.items()},
        **dict.fromkeys(parts.holders, Leaf(kind="the state of an object")),
    }


def numbers(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """`metrics` as floats.

    Raises:
        CheckpointError: One is not a number.
    """
    found = plain_json({name: np.asarray(value).tolist() for name, value in (metrics or {}).items()}, "metrics")
    for name, value in found.items():
        if not isinstance(value, int | float):
            raise CheckpointError(f"metrics: {name} is {value!r}, not a number. Reduce it (x.mean()), or leave it out.")
    return {name: float(value) for name, value in found.items()}


def versions() -> dict[str, str]:
    """The versions that decide what a checkpoint looks like and which bits a step computes."""
    return {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}


def _described(leaf: Any) -> Leaf:
    if not is_key(leaf):
        return Leaf(kind=str(leaf.dtype), shape=tuple(leaf.shape))
    bits = jax.eval_shape(jax.random.key_data, leaf)
    return Leaf(kind=str(leaf.dtype), shape=tuple(leaf.shape), stored=(bits.shape, str(bits.dtype)))


def _leaf_to_json(leaf: Leaf) -> Any:
    if leaf.shape is None:
        return leaf.kind
    return [list(leaf.shape), leaf.kind, *([list(leaf.stored[0]), leaf.stored[1]] if leaf.stored else [])]


def _leaf_from_json(name: str, written: Any) -> Leaf:
    """A leaf; a checkpoint may come from anybody, so what no array can be is refused here."""
    if isinstance(written, str):
        return Leaf(kind=written)
    wrong = ValueError(f"{name}: {written!r} is not the shape and dtype of an array")
    try:
        shape, kind, *stored = written
        leaf = Leaf(kind=kind, shape=tuple(shape), stored=(tuple(stored[0]), stored[1]) if stored else None)
        sizes, dtype = leaf.stored or (leaf.shape or (), leaf.kind)
        is_array = not jnp.dtype(dtype).hasobject and re.fullmatch("[a-z0-9_]+", dtype)
    except (TypeError, ValueError, IndexError):
        raise wrong from None
    if not is_array or not all(isinstance(size, int) and size >= 0 for size in (*sizes, *(leaf.shape or ()))):
        raise wrong
    return leaf
