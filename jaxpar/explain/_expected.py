"""Which collective of a compiled program is which move of its plan.

A tensor is a move if it has its kind, its axes and its number of elements, and if it does not run more often than the
plan says: a weight that is gathered a third time is expected by nobody. Names help where sizes are equal: JAX marks
the backward pass and what it computes again. Sums of the loss and of norms are no leaf's, and have words of their own.

What a compiler may do otherwise and still be right: reduce the gradients of all stacked layers at once, after the loop,
and reduce in the dtype in which it computes. Accumulation runs what a microbatch needs once for each of them; a
gradient that crosses axes of replicas within that loop is not what the plan says.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from .._context import axes_at
from .._hlo import Collective
from .._plan import Move, Plan, Record
from .._sequence import SCOPE, meetings
from .._types import Axes

_FEW_NUMBERS = 8
"""A sum of as many numbers is a loss with its weight, a norm or a count: no array of a model."""

_AGAIN = ", which computes the block again"
"""As a plan's moves say it of weights."""


_EACH_USE = "for each use of it"
"""As a plan's moves say it of tables."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """What a plan says of one collective.

    Attributes:
        words: The move that it is, `"weight, forward pass of each layer"`; `""` if the plan expects none.
        paths: The leaves that it may serve: several if they are of one size, or combined into one collective.
    """

    words: str
    paths: tuple[str, ...] = ()


def expected(collectives: Iterable[Collective], plan: Plan, *, num_tokens: int = 0) -> dict[tuple[str, str], Match]:
    """What `plan` says of each instruction among `collectives`, by `(computation, instruction)`.

    Args:
        collectives: Of the whole program, in its order.
        plan: That it was compiled for.
        num_tokens: Of the global batch (rows, without a sequence): how large activations are. Without it an
            activation is one of any number of tokens.
    """
    pool = _Pool(plan, num_tokens)
    found: dict[tuple[str, str], list[tuple[Match, int]]] = {}
    for each in collectives:
        found.setdefault((each.computation, each.name), []).append((pool.take(each), each.bytes))
    return {place: _together(tensors) for place, tensors in found.items()}


@dataclasses.dataclass
class _Want:
    """A move that a leaf is still to make."""

    record: Record
    move: Move
    elements: int
    left: int

    def fits(self, each: Collective) -> int:
        """How many runs of the move `each` is, a time; 0 if it is not this move."""
        if each.kind != self.move.kind or each.axes != self.move.axes:
            return 0
        number = math.prod(each.shape)
        if number == self.elements:
            return 1
        is_stack = self.move.what == "gradient" and self.move.times > 1
        return self.move.times if is_stack and number == self.elements * self.move.times else 0


class _Pool:
    """The moves of a plan, each as often as it is made in a step."""

    def __init__(self, plan: Plan, num_tokens: int) -> None:
        self.plan = plan
        self.tokens = num_tokens // math.prod(plan.axes[axis] for axis in plan.token_axes)
        self.wants = [want for record in plan.records.values() for want in _wants(plan, record)]
        self.by_kind: dict[tuple[str, Axes], list[_Want]] = collections.defaultdict(list)
        for want in self.wants:
            self.by_kind[want.move.kind, want.move.axes].append(want)

    def take(self, each: Collective) -> Match:
        """The move that `each` is, which is then made."""
        fitting = [want for want in self.by_kind[each.kind, each.axes] if self._fits(want, each)]
        if not each.depth and all(want.record.layers and want.move.per_token for want in fitting):
            if words := self._vocabulary(each):  # outside of the loop over layers the two ends come first
                return Match(words=words)
        chosen = min(fitting, key=lambda want: _rank(want, each), default=None)
        if chosen is not None and self._use(chosen, each):
            same = [want for want in fitting if (want.move.what, want.move.when) == _role(chosen)]
            named = [want.record.path for want in same if _is_named(want.record.path, each.op_name)]
            paths = named or [want.record.path for want in same]
            return Match(words=f"{chosen.move.what}, {chosen.move.when}", paths=tuple(dict.fromkeys(paths)))
        return Match(words=self._no_leafs(each))

    def _fits(self, want: _Want, each: Collective) -> bool:
        if not want.move.per_token:
            return bool(want.fits(each))
        if (each.kind, each.axes) != (want.move.kind, want.move.axes):
            return False
        tokens, rest = divmod(math.prod(each.shape), want.elements)
        if each.kind == "all-to-all":  # how many choices a token has, and how much room there is, is not in the plan
            return not rest and tokens > 0
        if rest or not tokens or not self.tokens:
            return not rest and tokens > 0
        is_microbatch = each.depth > want.record.layers  # in a loop over microbatches, of an unknown number
        return self.tokens % tokens == 0 if is_microbatch else self.tokens == tokens

    def _use(self, want: _Want, each: Collective) -> bool:
        """Make the move as often as `each` runs, from all leaves that move alike; false if that is too often."""
        count = each.count
        if count is None:
            return True
        alike = [
            other
            for other in self.by_kind[each.kind, each.axes]
            if _role(other) == _role(want) and self._fits(other, each)
        ]
        runs = 1 if want.move.per_token else want.fits(each)
        is_in_a_scan = want.record.layers and want.move.times > 1 and runs == 1  # of one layer there is none
        if each.depth > is_in_a_scan and _is_each_microbatch(self.plan, want.move):
            count = min(count, want.move.times)  # in a loop over microbatches too
        left = sum(other.left for other in alike)
        if count * runs > left:
            return False
        for other in sorted(alike, key=lambda other: other is not want):
            used = min(other.left, count * runs)
            other.left -= used
            count -= used // runs
        return True

    def _no_leafs(self, each: Collective) -> str:
        """What is expected of a step though no leaf moves: sums of numbers, and the two ends of a split vocabulary."""
        if each.kind == "all-reduce" and math.prod(each.shape) <= _FEW_NUMBERS:
            return self._sums(each)
        return self._between_stages(each) or self._attention(each) or self._vocabulary(each) or self._sizes(each)

    def _sizes(self, each: Collective) -> str:
        """What dropless experts say of their rows before these come."""
        over = self.plan.dims.get("expert", ())
        numbers = {record.shape[record.layers] for record in self.plan.parameters if set(over) & _axes(record)}
        is_one = each.kind == "all-to-all" and each.axes == over and math.prod(each.shape) in numbers
        return "how many rows each expert gets" if is_one else ""

    def _between_stages(self, each: Collective) -> str:
        """What a pipeline moves."""
        if self.plan.stage_axis is None or each.axes != (self.plan.stage_axis,):
            return ""
        return {
            "collective-permute": "activation to the next stage, or its gradient to the one before",
            "all-reduce": "activation or gradient, between the stages and what is outside of them",
        }.get(each.kind, "")

    def _attention(self, each: Collective) -> str:
        """How the parts of a sequence meet."""
        split = self.plan.context
        if split is None or each.axes != (split.axis,) or SCOPE not in each.op_name:
            return ""
        kinds = {"all-gather", *(meeting.kind for meeting in meetings(split))}  # positions and segments are gathered
        return f"attention, {split.method}" if each.kind in kinds else ""

    def _vocabulary(self, each: Collective) -> str:
        """The two ends of a model whose vocabulary is split."""
        number, vocab = math.prod(each.shape), set(self.plan.dims.get("vocab", ()))
        if each.kind != "all-reduce" or not vocab or set(each.axes) != vocab or not self.tokens:
            return ""
        sizes = [number // several for several in (1, 2, 3) if number % several == 0]
        if any(self._are_tokens(tokens, each) for tokens in sizes):
            return "softmax, over a split vocabulary"
        ends = [record for record in self.plan.parameters if vocab & _axes(record) and len(record.shape) > 1]
        widths = {size for record in ends for size in record.shape[-2:]}
        if any(number % width == 0 and self._are_tokens(number // width, each) for width in widths):
            return "activation, embedded rows or their gradient, at a split vocabulary"
        return ""

    def _are_tokens(self, number: int, each: Collective) -> bool:
        """Whether `number` is that of a device's tokens, of a microbatch's in a loop."""
        return number == self.tokens or bool(each.depth and number and self.tokens % number == 0)

    def _sums(self, each: Collective) -> str:
        batch = set(self.plan.token_axes)
        cut = set().union(*(_axes(record) for record in self.plan.parameters))
        names = _names(each.op_name)
        said = []
        if set(each.axes) <= batch and (not names or any("jvp" in name for name in names) or set(each.axes) - cut):
            said.append("sum of the loss or of its weight")
        if set(each.axes) <= cut and (not names or any("jvp" not in name for name in names)):
            said.append("norm, of leaves that are cut over these axes")
        return "; ".join(said)


def _wants(plan: Plan, record: Record) -> Iterator[_Want]:
    for move in plan.moves(record):
        dtype = record.compute_dtype if move.what in ("weight", "activation") else record.dtype
        elements = move.bytes // np.dtype(dtype).itemsize
        uses = 2 if move.when.endswith(_EACH_USE) else 1  # a tied table has two
        yield _Want(record=record, move=move, elements=max(elements, 1), left=move.times * uses)
        if move.per_token and record.remat and move.when.startswith("forward"):
            again = dataclasses.replace(move, when=move.when.replace("forward", "backward", 1) + _AGAIN)
            yield _Want(record=record, move=again, elements=max(elements, 1), left=move.times)


def _role(want: _Want) -> tuple[str, str]:
    return want.move.what, want.move.when


def _rank(want: _Want, each: Collective) -> tuple[bool, ...]:
    """Better candidates first: with runs left, in a loop over layers or not, of the pass and leaf of the name."""
    is_out = bool(want.record.layers) > bool(each.depth)
    return (
        want.left <= 0,
        is_out,
        not _is_pass(want.move, each.op_name),
        not _is_named(want.record.path, each.op_name),
    )


def _is_pass(move: Move, op_name: str) -> bool:
    """Whether `op_name` is of the pass that a move is made in."""
    backward = "transpose(" in op_name
    if move.when.startswith("forward"):
        return "jvp(" in op_name and not backward
    if _AGAIN in move.when:
        return "rematted_computation" in op_name
    return backward if move.when.startswith("backward") else "jvp(" not in op_name


def _is_named(path: str, op_name: str) -> bool:
    """Whether the words of a path are in a name, in their order: `blocks.each.up.kernel` in `.../blocks/up/dot`."""
    words = [word for word in path.split(".") if not word.isdigit() and word not in ("each", "kernel", "params")]
    return bool(words) and re.search(r"\b.*\b".join(map(re.escape, words)), op_name) is not None


def _is_each_microbatch(plan: Plan, move: Move) -> bool:
    return move.what != "gradient" or set(move.axes) <= set(plan.shards)


def _names(op_name: str) -> list[str]:
    """The names in one of operations that were combined: `a/(b:c)` has two."""
    inside = re.search(r"/\((.*:.*)\)$", op_name)
    return inside.group(1).split(":") if inside else [op_name] if op_name else []


def _axes(record: Record) -> set[str]:
    specs = (record.storage, record.compute, record.gradient, record.slots)
    return {axis for spec in specs for entry in spec for axis in axes_at(entry)}


def _together(tensors: Sequence[tuple[Match, int]]) -> Match:
    """Tensors that were combined into one instruction: expected if most of its bytes are."""
    words = list(dict.fromkeys(each.words for each, _ in tensors if each.words))
    paths = tuple(dict.fromkeys(path for each, _ in tensors for path in each.paths))
    strange = [size for each, size in tensors if not each.words]
    if 2 * sum(strange) > sum(size for _, size in tensors):
        return Match(words="", paths=paths)
    if strange:
        words.append(f"and {len(strange)} of {len(tensors)} tensors that the plan does not expect")
    return Match(words="; ".join(words), paths=paths)
