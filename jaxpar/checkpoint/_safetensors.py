"""A directory of safetensors files, as Hugging Face lays it out: which tensor is where, and blocks of tensors.

`model.safetensors` alone, or several files with `model.safetensors.index.json`. The names in an index come from anyone:
each must be a plain name of a file beside it. The format holds no code, and its own library checks every header; what
holds pickles is refused by name. A block is read through a mapping that is dropped at once, and written in runs, so
that processes may write into one file.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from .._errors import CheckpointError, listed
from ._tensor import Made, Slices

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
MAX_INDEX_BYTES = 1 << 28
LEGAL_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip
CODES = {kind: code for code, kind in DTYPES.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: Its path.
        offset: Of the first byte.
        shape: As in the file.
        kind: Its dtype, as JAX calls it.
    """

    file: pathlib.Path
    offset: int
    shape: tuple[int, ...]
    kind: str

    def __str__(self) -> str:
        return f"{self.shape} {self.kind}"

    def read(self, view: Sequence[int], block: Slices) -> np.ndarray:
        """A block of the tensor, seen in the shape `view`: a mapping of the file, of which only the block is read."""
        return np.memmap(self.file, jnp.dtype(self.kind), "r", self.offset, tuple(view))[(*block, ...)]

    def write(self, view: Sequence[int], block: Slices, values: np.ndarray) -> None:
        """Write a block; `values` has its shape. Bytes beside it are not touched, by any file system."""
        data = np.ascontiguousarray(values.astype(jnp.dtype(self.kind), copy=False))
        descriptor = os.open(self.file, os.O_WRONLY | os.O_NOFOLLOW)
        try:
            for start, run in _runs(tuple(view), block, data):
                _write_all(descriptor, run, self.offset + start * data.itemsize)
        finally:
            os.close(descriptor)


def found(directory: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of `directory`, by name; or of one file, if that is what it is.

    Raises:
        CheckpointError: There is none; or naming all files and tensors that an index should not name.
        ModuleNotFoundError: The extra `hf` is not installed.
    """
    if directory.is_file() and directory.suffix == ".safetensors":
        return _tensors(directory)
    index, single = directory / INDEX, directory / SINGLE
    if index.is_file():
        return _of_index(index)
    if single.is_file():
        return _tensors(single)
    pickles = [path.name for path in sorted(directory.glob("*")) if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    why = (
        f" {', '.join(pickles[:3])}: pickles, which can run any code, so they are never read. Where they are trusted, "
        "load them with transformers and write them with save_pretrained(...)."
        if pickles
        else " Check the path."
    )
    raise CheckpointError(f"{directory} holds neither {SINGLE} nor {INDEX}.{why}")


def lay_out(directory: pathlib.Path, tensors: Mapping[str, Made], most_bytes: int) -> dict[str, Stored]:
    """Where each tensor is to be written, in files of at most `most_bytes` each (or one tensor, if that is larger)."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        num = _num_bytes(tensor)
        if groups[-1] and size + num > most_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num
    names = [SINGLE] if len(groups) == 1 else [
        f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)
    ]  # fmt: skip
    placed = {}
    for file, group in zip(names, groups, strict=True):
        offset = len(header({name: tensors[name] for name in group}))
        for name in group:
            tensor = tensors[name]
            placed[name] = Stored(file=directory / file, offset=offset, shape=tensor.shape, kind=tensor.kinds[0])
            offset += _num_bytes(tensor)
    return placed


def create(directory: pathlib.Path, tensors: Mapping[str, Made], placed: Mapping[str, Stored]) -> None:
    """Make the files with their headers, of full size and without values, and the index if there are several."""
    files: dict[pathlib.Path, dict[str, Made]] = {}
    for name, stored in placed.items():
        files.setdefault(stored.file, {})[name] = tensors[name]
    for file, inside in files.items():
        begin = header(inside)
        with file.open("xb") as opened:
            opened.write(begin)
            opened.truncate(len(begin) + sum(map(_num_bytes, inside.values())))
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(map(_num_bytes, tensors.values()))},
            "weight_map": {name: stored.file.name for name, stored in sorted(placed.items())},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def header(tensors: Mapping[str, Made]) -> bytes:
    """The first bytes of a file of these tensors, in this order: a length, and JSON padded to eight bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses the file
    at = 0
    for name, tensor in tensors.items():
        end = at + _num_bytes(tensor)
        entries[name] = {
            "dtype": CODES[tensor.kinds[0]], "shape": list(tensor.shape), "data_offsets": [at, end]
        }  # fmt: skip
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _of_index(index: pathlib.Path) -> dict[str, Stored]:
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{index}: {index.stat().st_size:,} bytes are no index. Download it again.")
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        by_file: dict[str, set[str]] = {}
        for name, file in files.items():
            by_file.setdefault(file, set()).add(name)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors ({error}). Download it again.") from None
    lines = [
        f"{file!r}: not the name of a safetensors file beside the index"
        for file in by_file
        if not LEGAL_FILE.fullmatch(file)
    ]
    if lines:  # nothing is opened by a name that may lead elsewhere
        raise CheckpointError(f"{index} was not written by an honest program.\n{listed(lines)}\nDo not use it.")
    tensors: dict[str, Stored] = {}
    for file, names in sorted(by_file.items()):
        path = index.parent / file
        # A link is followed: a hub's cache is made of links to its blobs, and what is there is only read as tensors.
        if not path.is_file():
            lines.append(f"{file}: missing, with {len(names)} tensors")
            continue
        inside = _tensors(path)
        lines += [f"{name}: not in {file}, where the index has it" for name in sorted(names - inside.keys())]
        tensors |= {name: inside[name] for name in inside if files.get(name) == file}
    if lines:
        raise CheckpointError(f"{index.parent} is incomplete.\n{listed(lines)}\nDownload what is missing.")
    return tensors


def _tensors(file: pathlib.Path) -> dict[str, Stored]:
    """The tensors of one file, whose header the format's own library has checked: sizes, overlaps, holes."""
    try:
        import safetensors
    except ModuleNotFoundError:
        raise ModuleNotFoundError("safetensors files need the extra 'hf': pip install 'jaxpar[hf]'") from None

    try:
        with safetensors.safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            entries = json.loads(opened.read(length))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}. It is cut or no safetensors file: download it again.") from None
    entries.pop("__metadata__", None)
    odd = sorted({entry["dtype"] for entry in entries.values()} - DTYPES.keys())
    if odd:
        raise CheckpointError(
            f"{file}: tensors of dtype {', '.join(odd)}, which is not known here. Convert them first."
        )
    return {
        name: Stored(
            file=file,
            offset=8 + length + entry["data_offsets"][0],
            shape=tuple(entry["shape"]),
            kind=DTYPES[entry["dtype"]],
        )
        for name, entry in entries.items()
    }


def _num_bytes(tensor: Made) -> int:
    return math.prod(tensor.shape) * jnp.dtype(tensor.kinds[0]).itemsize


def _runs(shape: tuple[int, ...], block: Slices, data: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The longest pieces of a block that lie in one run in a C-ordered array of `shape`: first element, and values."""
    inner = len(shape)  # from this dim on, the block is whole
    while inner and data.shape[inner - 1] == shape[inner - 1]:
        inner -= 1
    inner = max(inner - 1, 0)  # of the dim before, a range is one run still
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    first = sum(span.start * stride for span, stride in zip(block, strides, strict=True))
    for index in np.ndindex(data.shape[:inner]):
        yield first + sum(at * stride for at, stride in zip(index, strides, strict=False)), data[index]


def _write_all(descriptor: int, run: np.ndarray, offset: int) -> None:
    left = run.reshape(-1).view(np.uint8).data
    while left:
        done = os.pwrite(descriptor, left, offset)
        left, offset = left[done:], offset + done
