"""One leaf of ours as tensors of another program: their names, and what lies where in which.

A file of another program has a tensor a layer, some transposed, some fused; a leaf of ours may be a stack of layers,
and a device holds a piece of it. `regions` says, for one piece, which block of which tensor it is, so that a piece is
read or written alone: no tensor, let alone a model, is ever whole in memory.
"""

import dataclasses
import itertools
import math
import string
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from .._errors import CheckpointError, listed

Slices = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a leaf lives in files of another program.

    Attributes:
        name: Of the tensor. Each `{}` is the index into one leading dim of the leaf: `"layers.{}.experts.{}.up"` for a
            leaf `[layers, experts, ...]`. What follows is about the rest of the dims.
        transpose: Order of the tensor's dims in the leaf, as for `numpy.transpose`; as they are if `None`.
        merged: How many dims of the leaf make each dim of the tensor, in the order of the tensor: `(2, 1)` if the leaf
            has `[heads, features, embed]` and the tensor `[heads * features, embed]`; 0 for a dim of size 1 that the
            leaf lacks. One each if `None`.
        part: `(dim, start, stop)` if the leaf is these rows of the tensor along one of its dims: queries, keys and
            values are three parts of a fused matrix.

    Example:
        >>> Tensor("model.layers.{}.self_attn.q_proj.weight", transpose=(1, 0)).named((7,))
        'model.layers.7.self_attn.q_proj.weight'
    """

    name: str
    _: dataclasses.KW_ONLY
    transpose: tuple[int, ...] | None = None
    merged: tuple[int, ...] | None = None
    part: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.part is not None and not 0 <= self.part[1] < self.part[2]:
            raise CheckpointError(f"{self.name}: part={self.part} holds nothing. Give (dim, start, stop).")
        if self.part is not None and self.merged is not None and self.merged[self.part[0]] != 1:
            raise CheckpointError(f"{self.name}: part and merged are about the same dim. Choose other dims.")

    @property
    def num_indices(self) -> int:
        """Leading dims of the leaf that the name spells out."""
        return sum(field is not None for _, field, _, _ in string.Formatter().parse(self.name))

    def named(self, at: Sequence[int]) -> str:
        """The name of the tensor at these indices."""
        return self.name.format(*at)

    def view(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The part of one tensor that a leaf of `shape` holds, with the leaf's dims in the tensor's order."""
        inner = tuple(shape[self.num_indices :])
        order = self._order(len(inner))
        return tuple(inner[order.index(dim)] for dim in range(len(inner)))

    def fused(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of that part, as the tensor has its dims."""
        sizes = iter(self.view(shape))
        groups = self.merged or (1,) * (len(shape) - self.num_indices)
        return tuple(math.prod(next(sizes) for _ in range(group)) for group in groups)

    def tensors(self, shape: Sequence[int]) -> Iterator[str]:
        """The names of all tensors that a leaf of `shape` is made of."""
        return map(self.named, itertools.product(*map(range, shape[: self.num_indices])))

    def problem(self, shape: Sequence[int]) -> str:
        """Why no leaf of `shape` can be this, or nothing."""
        num, inner = self.num_indices, len(shape) - self.num_indices
        if inner < 0:
            return f"the name spells out {num} dims, and the leaf has {len(shape)}"
        if sorted(self._order(inner)) != list(range(inner)):
            return f"transpose={self.transpose} is no order of {inner} dims"
        if self.merged is not None and sum(self.merged) != inner:
            return f"merged={self.merged} is about {sum(self.merged)} dims of {inner}"
        return ""

    def regions(self, shape: Sequence[int], piece: Slices) -> Iterator["Region"]:
        """Which block of which tensor each part of a piece of the leaf is.

        Args:
            shape: Of the whole leaf.
            piece: A slice a dim of the leaf, as a device holds it.
        """
        num = self.num_indices
        spans = [slice(*each.indices(size)[:2]) for each, size in zip(piece, shape, strict=True)]
        order = self._order(len(shape) - num)
        block = [spans[num + order.index(dim)] for dim in range(len(order))]
        if self.part is not None:
            dim, start, _ = self.part
            at = sum((self.merged or (1,) * len(order))[:dim])
            block[at] = slice(block[at].start + start, block[at].stop + start)
        for index in itertools.product(*(range(span.start, span.stop) for span in spans[:num])):
            where = tuple(each - span.start for each, span in zip(index, spans[:num], strict=True))
            yield Region(name=self.named(index), block=tuple(block), where=where)

    def full_view(self, shape: Sequence[int], tensor: Sequence[int]) -> tuple[int, ...]:
        """The whole of a tensor whose shape in the file is `tensor`, with the leaf's dims in the tensor's order."""
        view = list(self.view(shape))
        if self.part is not None:
            view[sum((self.merged or (1,) * len(view))[: self.part[0]])] = tensor[self.part[0]]
        return tuple(view)

    def in_leaf(self, block: np.ndarray) -> np.ndarray:
        """A block with its dims in the order of the leaf."""
        return block if self.transpose is None else block.transpose(self.transpose)

    def in_tensor(self, values: np.ndarray) -> np.ndarray:
        """Values of the leaf, without its leading dims, with their dims in the order of the tensor."""
        return values if self.transpose is None else values.transpose(np.argsort(self.transpose))

    def _order(self, num: int) -> tuple[int, ...]:
        return tuple(range(num)) if self.transpose is None else self.transpose


@dataclasses.dataclass(frozen=True, kw_only=True)
class Region:
    """A block of one tensor, and where it is in a piece of a leaf.

    Attributes:
        name: Of the tensor.
        block: A slice a dim, of the tensor as `full_view` has it.
        where: The index into the leading dims of the piece.
    """

    name: str
    block: Slices
    where: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """A tensor as our leaves make it.

    Attributes:
        shape: As in the file.
        kinds: The dtypes of the leaves that it is of; one, or the layout cannot be written.
        leaf: The path of one of those.
    """

    shape: tuple[int, ...]
    kinds: tuple[str, ...]
    leaf: str


def made(layout: Mapping[str, Tensor], leaves: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Made]:
    """Every tensor that leaves are made of, in their order.

    Args:
        layout: By path of the leaf.
        leaves: Shape and dtype, by path.
    Raises:
        CheckpointError: Naming all leaves that the layout lacks, has too many, or cannot be; and tensors whose parts
            overlap or leave a gap.
    """
    lines = [f"{path}: {shape} {kind}, which the layout lacks" for path, (shape, kind) in leaves.items()
             if path not in layout]  # fmt: skip
    lines += [f"{path}: in the layout, and not here" for path in layout if path not in leaves]
    both = {path: layout[path] for path in leaves if path in layout}
    lines += [f"{path}: {why}" for path, tensor in both.items() if (why := tensor.problem(leaves[path][0]))]
    if lines:
        raise CheckpointError(f"The layout is one of another model.\n{listed(lines)}\nMake the layout for this model.")

    uses: dict[str, list[tuple[str, Tensor]]] = {}
    for path, tensor in both.items():
        for name in tensor.tensors(leaves[path][0]):
            uses.setdefault(name, []).append((path, tensor))
    found = {}
    for name, its in uses.items():
        shapes = [tensor.fused(leaves[path][0]) for path, tensor in its]
        shape, why = _joined(shapes, [tensor.part for _, tensor in its])
        if why:
            lines.append(f"{name}: {why}, from {', '.join(path for path, _ in its)}")
        kinds = tuple(dict.fromkeys(leaves[path][1] for path, _ in its))
        found[name] = Made(shape=shape, kinds=kinds, leaf=its[0][0])
    if lines:
        raise CheckpointError(f"{listed(lines)}\nMend the layout: leaves fill each tensor once.")
    return found


def _joined(shapes: list[tuple[int, ...]], parts: list[tuple[int, int, int] | None]) -> tuple[tuple[int, ...], str]:
    """The shape of a tensor of which there are these parts; and what is wrong with them."""
    if len(parts) == 1 and parts[0] is None:
        return shapes[0], ""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or len({dim for dim, _, _ in known}) > 1:
        return shapes[0], "several leaves, not all parts along one dim"
    dim, end = known[0][0], 0
    for (_, start, stop), shape in sorted(zip(known, shapes, strict=True)):
        if start != end or stop - start != shape[dim]:
            return shapes[0], f"rows {start} to {stop} of dim {dim}, after row {end}, for a leaf with {shape[dim]}"
        end = stop
    whole = [(*shape[:dim], end, *shape[dim + 1 :]) for shape in shapes]
    return whole[0], "" if len(set(whole)) == 1 else f"parts of different shapes, {sorted(set(whole))}"
