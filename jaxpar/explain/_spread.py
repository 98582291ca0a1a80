"""How every array of a traced gradient is split on a mesh, as far as that follows from its inputs.

A small version of what XLA's partitioner does, over names of axes rather than devices: a batch is split by its rows, a
parameter as the plan has it read, and a result as its operands are. Where a contraction runs over a split dim, the
result is a sum of parts, which somebody must add up: that is where tensor parallelism communicates.

A *split* is, for each dim, the axes that cut it.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from .._compat import scan_counts
from ._trace import Block, Op, Value

Split = tuple[tuple[str, ...], ...]


class Spread:
    """The splits of one trace on one mesh.

    Args:
        sizes: Of each axis.
    """

    def __init__(self, sizes: Mapping[str, int]):
        self.sizes = sizes
        self.of: dict[int, Split] = {}

    def split(self, value: Value) -> Split:
        """How `value` is split."""
        return self.of.get(id(value), ((),) * len(value.shape))

    def shape(self, value: Value) -> tuple[int, ...]:
        """One device's piece of `value`."""
        return tuple(-(-size // self.parts(axes)) for size, axes in zip(value.shape, self.split(value), strict=True))

    def size(self, value: Value) -> int:
        """Elements of one device's piece."""
        return math.prod(self.shape(value))

    def num_bytes(self, value: Value) -> float:
        """Bytes of one device's piece."""
        return self.size(value) * value.itemsize

    def trips(self, op: Op) -> float:
        """How often one device runs a loop: a loop over rows is shared among those that have them."""
        if op.name != "scan":
            return 1
        at = sum(scan_counts(op.params))
        cuts = [self.parts(self.split(value)[0]) for value in op.inputs[at:] if value is not None and value.shape]
        return max(1.0, op.trips / max(cuts, default=1))

    def run(self, block: Block, inputs: Sequence[Split]) -> list[Split]:
        """Split every array of `block`, and give the splits of its results."""
        for value, split in zip(block.inputs, inputs, strict=True):
            self.of[id(value)] = split
        for op in block.ops:
            rule = _RULES.get(op.name, _alike)
            for value, split in zip(op.outputs, rule(self, op), strict=True):
                self.of[id(value)] = split
        return [() if value is None else self.split(value) for value in block.outputs]

    def given(self, op: Op) -> list[Split]:
        """The splits of what `op` reads; nothing for literals."""
        return [() if value is None else self.split(value) for value in op.inputs]

    def parts(self, axes: Sequence[str]) -> int:
        """Into how many parts `axes` cut a dim."""
        return math.prod(self.sizes[axis] for axis in axes)


def _merged(splits: Sequence[Split], ndim: int) -> Split:
    """Arrays of one shape together: each dim as the first that cuts it, each axis once."""
    merged: list[tuple[str, ...]] = [()] * ndim
    used: set[str] = set()
    for split in splits:
        for dim, axes in enumerate(split):
            if axes and not merged[dim] and not used & set(axes):
                merged[dim] = axes
                used |= set(axes)
    return tuple(merged)


def _once(split: Sequence[tuple[str, ...]]) -> Split:
    used: set[str] = set()
    out = []
    for axes in split:
        out.append(() if used & set(axes) else axes)
        used |= set(axes)
    return tuple(out)


def _alike(spread: Spread, op: Op) -> list[Split]:
    """Elementwise, and whatever else keeps the rank of an operand: dims of equal size are cut alike."""
    made = []
    for out in op.outputs:
        found = [
            tuple(
                axes if size == whole else () for size, whole, axes in zip(value.shape, out.shape, split, strict=True)
            )
            for value, split in zip(op.inputs, spread.given(op), strict=True)
            if value is not None and len(value.shape) == len(out.shape)
        ]
        made.append(_merged(found, len(out.shape)))
    return made


def _broadcast(spread: Spread, op: Op) -> list[Split]:
    (out,), value, split = op.outputs, op.inputs[0], spread.given(op)[0]
    made: list[tuple[str, ...]] = [()] * len(out.shape)
    for dim, to in enumerate(op.params["broadcast_dimensions"] if value is not None else ()):
        if value is not None and value.shape[dim] == out.shape[to]:
            made[to] = split[dim]
    return [tuple(made)]


def _transpose(spread: Spread, op: Op) -> list[Split]:
    split = spread.given(op)[0]
    return [tuple(split[dim] for dim in op.params["permutation"])]


def _reshape(spread: Spread, op: Op) -> list[Split]:
    """A dim that is cut stays so where it is the first of those that it becomes or goes into, as they divide."""
    (out,), value, split = op.outputs, op.inputs[0], spread.given(op)[0]
    made: list[tuple[str, ...]] = [()] * len(out.shape)
    if value is None:
        return [tuple(made)]
    old, new = list(value.shape), list(out.shape)
    i = j = 0
    while i < len(old) and j < len(new):
        first, start = i, j
        a, b = old[i], new[j]
        while a != b and (i + 1 < len(old) or j + 1 < len(new)):
            if a < b and i + 1 < len(old):
                i += 1
                a *= old[i]
            elif a > b and j + 1 < len(new):
                j += 1
                b *= new[j]
            else:
                break
        # Leading 1s of a group carry nothing: what counts is the first dim that is longer.
        at = next((dim for dim in range(first, i + 1) if old[dim] > 1), first)
        to = next((dim for dim in range(start, j + 1) if new[dim] > 1), start)
        left = new[to] if to <= j else 1
        for axis in split[at]:
            while to < j and left % spread.sizes[axis]:
                to += 1
                left = new[to]
            if left % spread.sizes[axis]:
                break
            made[to] = (*made[to], axis)
            left //= spread.sizes[axis]
        i, j = i + 1, j + 1
    return [tuple(made)]


def _squeeze(spread: Spread, op: Op) -> list[Split]:
    gone = {dim % len(spread.given(op)[0]) for dim in op.params["dimensions"]}
    return [tuple(axes for dim, axes in enumerate(spread.given(op)[0]) if dim not in gone)]


def _reduce(spread: Spread, op: Op) -> list[Split]:
    gone = set(op.params["axes"])
    split = tuple(axes for dim, axes in enumerate(spread.given(op)[0]) if dim not in gone)
    return [split] * len(op.outputs)


def _dot(spread: Spread, op: Op) -> list[Split]:
    (contract_l, contract_r), (batch_l, batch_r) = op.params["dimension_numbers"]
    left, right = spread.given(op)
    free_l = [axes for dim, axes in enumerate(left) if dim not in (*contract_l, *batch_l)]
    free_r = [axes for dim, axes in enumerate(right) if dim not in (*contract_r, *batch_r)]
    both = [a or b for a, b in ((left[i], right[j]) for i, j in zip(batch_l, batch_r, strict=True))]
    # An axis that cuts a free dim of both can stay with one: with the matrix, whose operand is then gathered.
    cut = {axis for axes in free_r for axis in axes}
    free_l = [() if cut & set(axes) else axes for axes in free_l]
    return [_once([*both, *free_l, *free_r])]


def _conv(spread: Spread, op: Op) -> list[Split]:
    numbers = op.params["dimension_numbers"]
    left, right = spread.given(op)
    made: list[tuple[str, ...]] = [()] * len(op.outputs[0].shape)
    made[numbers.out_spec[0]] = left[numbers.lhs_spec[0]]
    made[numbers.out_spec[1]] = right[numbers.rhs_spec[0]]
    return [_once(made)]


def _concatenate(spread: Spread, op: Op) -> list[Split]:
    ndim, dim = len(op.outputs[0].shape), op.params["dimension"]
    merged = _merged([split for split in spread.given(op) if split], ndim)
    return [tuple(() if at == dim else axes for at, axes in enumerate(merged))]


def _slice(spread: Spread, op: Op) -> list[Split]:
    """`slice`, `pad`, `split`, `dynamic_slice`: dims that keep their size keep their cuts."""
    value, split = op.inputs[0], spread.given(op)[0]
    if value is None:
        return [((),) * len(out.shape) for out in op.outputs]
    return [
        tuple(axes if value.shape[dim] == out.shape[dim] else () for dim, axes in enumerate(split))
        for out in op.outputs
    ]


def _gather(spread: Spread, op: Op) -> list[Split]:
    numbers = op.params["dimension_numbers"]
    value, split, indices = op.inputs[0], spread.given(op)[0], spread.given(op)[1]
    out = op.outputs[0]
    made: list[tuple[str, ...]] = [()] * len(out.shape)
    if value is None:
        return [tuple(made)]
    gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
    kept = [dim for dim in range(len(value.shape)) if dim not in gone]
    for dim, to in zip(kept, numbers.offset_dims, strict=True):
        made[to] = split[dim] if op.params["slice_sizes"][dim] == value.shape[dim] else ()
    others = [dim for dim in range(len(out.shape)) if dim not in numbers.offset_dims]
    for to, axes in zip(others, indices[:-1], strict=False):
        made[to] = axes
    return [_once(made)]


def _scatter(spread: Spread, op: Op) -> list[Split]:
    """As what is written into lies; a window that is whole may be cut as the updates are."""
    numbers = op.params["dimension_numbers"]
    value, split, updates = op.inputs[0], spread.given(op)[0], spread.given(op)[2]
    out = op.outputs[0]
    gone = {*numbers.inserted_window_dims, *getattr(numbers, "operand_batching_dims", ())}
    kept = [dim for dim in range(len(out.shape)) if dim not in gone]
    made = list(split) if value is not None else [()] * len(out.shape)
    for dim, at in zip(kept, numbers.update_window_dims, strict=True):
        if at < len(updates) and not made[dim]:
            made[dim] = updates[at]
    return [_once(made)]


def _scan(spread: Spread, op: Op) -> list[Split]:
    (block,) = op.blocks
    num_consts, num_carry = scan_counts(op.params)
    given = [
        split if value is not None else ((),) * len(inner.shape)
        for value, split, inner in zip(op.inputs, spread.given(op), block.inputs, strict=True)
    ]
    scanned = [split[1:] if value is not None else split for value, split in zip(op.inputs, given, strict=True)]
    carry = given[num_consts : num_consts + num_carry]
    leads = [split[0] for value, split in zip(op.inputs, given, strict=True) if value is not None and split]
    found: list[Split] = []
    for _ in range(3):  # cuts only ever join, so this ends
        inputs = [*given[:num_consts], *carry, *scanned[num_consts + num_carry :]]
        found = spread.run(block, inputs)
        after = [
            _merged([old, new], len(inner.shape))
            for old, new, inner in zip(carry, found[:num_carry], block.inputs[num_consts:], strict=False)
        ]
        if after == carry:
            break
        carry = after
    lead = next((axes for axes in leads[num_consts + num_carry :] if axes), ())
    ys = [
        _once([lead, *(split or ((),) * (len(out.shape) - 1))])
        for split, out in zip(found[num_carry:], op.outputs[num_carry:], strict=True)
    ]
    return [*carry, *ys]


def _while(spread: Spread, op: Op) -> list[Split]:
    skip = op.params["cond_nconsts"]
    found = spread.run(op.blocks[0], _filled(spread, op.blocks[0], op.inputs[skip:]))
    return [
        _merged([split, new], len(out.shape))
        for split, new, out in zip(spread.given(op)[-len(op.outputs) :], found, op.outputs, strict=True)
    ]


def _cond(spread: Spread, op: Op) -> list[Split]:
    found = [spread.run(block, _filled(spread, block, op.inputs[1:])) for block in op.blocks]
    return [_merged([splits[at] for splits in found], len(out.shape)) for at, out in enumerate(op.outputs)]


def _filled(spread: Spread, block: Block, values: Sequence[Value | None]) -> list[Split]:
    return [
        ((),) * len(inner.shape) if value is None else spread.split(value)
        for value, inner in zip(values, block.inputs, strict=True)
    ]


_RULES: dict[str, Callable[[Spread, Op], list[Split]]] = {
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "concatenate": _concatenate,
    "gather": _gather,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    **dict.fromkeys(("slice", "pad", "split", "dynamic_slice"), _slice),
    **dict.fromkeys(("scatter", "scatter-add", "scatter_add"), _scatter),
    **dict.fromkeys(
        ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"),
        _reduce,
    ),
}
