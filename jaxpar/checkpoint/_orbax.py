"""Everything that jaxpar asks of Orbax, and every file name of Orbax's that it knows.

Orbax's v1 interface is experimental and renames functions between minor series; only this module follows.
Orbax 0.12 writes outside of its root for some names, merges `{"a.b"}` with `{"a": {"b"}}`, holds up the exit of the
process for five minutes after a save that it refused (an empty array, a relative path), and restores wrong numbers
after a flipped bit. So what it is given here is always one flat dict, checked before, under one fixed name, in a
directory that is not the checkpoint yet; what it wrote is hashed before it becomes one, and again before it is read.
"""

import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from . import _blocks
from ._target import Asked

FILE_BYTES, MOST_FILES = 1 << 24, 64  # of a process; more bytes a file if it has more
CHUNK_BYTES = 1 << 22
INDEX_BYTES = 100_000_000  # at most; about 100 bytes a chunk


def prepare() -> None:
    """Import Orbax. It takes 0.3 s of a processor, and training would stand still for it in its first save."""
    from orbax.checkpoint import v1  # noqa: F401  # for later


def write(path: pathlib.Path, arrays: Mapping[str, Any]) -> Callable[[], None]:
    """Start to write `arrays` to `path`, which does not exist.

    Returns once every array has been copied to host memory: it may be donated or changed then. What it returns waits
    until `path` is there, and raises what went wrong.
    """
    from orbax.checkpoint import v1 as ocp

    with settings(arrays):
        return ocp.save_async(str(path), dict(arrays)).result


def append(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Write some more arrays of what `finish` will make appear at `path`. By one process alone."""
    from orbax.checkpoint import v1 as ocp

    with settings(arrays):
        ocp.partial.save(str(path), dict(arrays))


def finish(path: pathlib.Path) -> None:
    """Make what was appended appear at `path`."""
    from orbax.checkpoint import v1 as ocp

    ocp.partial.finalize(str(path))


def read(path: pathlib.Path, targets: Mapping[str, Asked]) -> dict[str, Any]:
    """Read arrays of `path`, each onto the sharding of its target, or into that if it is a NumPy array.

    A process reads what its own devices hold; what is not asked for is not read. A dtype may be another one. What is in
    host memory beside the result is said in `_blocks`. TensorStore reads, which Orbax writes with: `ocp.load` bounds
    what is in memory by whole pieces of arrays, and takes two to four times the CPU time.
    """
    import tensorstore as ts

    # The tree of chunks of all arrays is read once. Files are mapped, not read: malloc keeps what is freed, an arena a
    # thread, so that with a buffer for each chunk a process grew by 103 MiB where chunks of 16 MiB were read at once.
    context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": INDEX_BYTES}, "file_io_mode": {"mode": "memmap"}})
    base = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{path / 'state'}/"},
        "cache_pool": "cache_pool#ocdbt",
    }
    spec = lambda name: {
        "driver": "zarr3",
        "kvstore": {**base, "path": f"{name}/"},
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
    }
    return _blocks.read({name: ts.open(spec(name), read=True, open=True, context=context) for name in targets}, targets)


def settings(arrays: Mapping[str, Any]) -> Any:
    """How Orbax is to write: without zstd, which its default has and which is what a save then waits for.

    Of 256 MB of float32 it saved 8%, and took two thirds of the time, on the cores that training needs. Files are
    small, so that they are hashed by several threads while others are written, and soon, while a processor's cache has
    them: a save with files of 16 MiB took 0.7 of the time of one with 64. Chunks are small, as who reads a part of one
    has all of it in memory: with a chunk a device, Orbax's default, a process that read 64 MiB of columns of what was
    saved by rows held 308 MiB.
    """
    from orbax.checkpoint import v1 as ocp

    own = sum(leaf.nbytes for leaf in arrays.values()) // jax.process_count()
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.ocdbt_target_data_file_size = max(FILE_BYTES, own // MOST_FILES)
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    return context


def writer(name: str) -> int:
    """The process that wrote the file called `name`, below the path of a checkpoint."""
    found = re.match(r"state/(?:ocdbt\.process_|array_metadatas/process_)(\d+)(?:/|$)", name)
    return int(found[1]) if found else 0


def whole(path: pathlib.Path, process: int) -> Iterator[pathlib.Path]:
    """The data files that `process` has written of what is to appear at `path`, each whole: it has its last name.

    They are flushed to the disk, as TensorStore writes.
    """
    return (
        file
        for file in path.parent.glob(f"{path.name}*/**/ocdbt.process_{process}/d/*")
        if re.fullmatch("[0-9a-f]+", file.name)
    )


def is_checkpoint(path: pathlib.Path) -> bool:
    """Whether Orbax wrote `path`, for whomever."""
    return (path / "_CHECKPOINT_METADATA").is_file()


def is_unfinished(name: str) -> bool:
    """Whether a directory called `name` is what Orbax leaves behind when its process is killed."""
    return ".orbax-checkpoint-tmp" in name or ".partial_save" in name
