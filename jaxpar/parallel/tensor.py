"""Tensor parallelism: matrices split over an axis in pairs, as in Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053).

Which dim is split, counted within one block (D = inputs, F = outputs):

    kernel (D, F)            column: dim 1   row: dim 0     flax, plain pytrees
    weight (F, D, ...)       column: dim 0   row: dim 1     torch order: a `weight` of an Equinox module
    kernel (D, heads, head)  column: dim 1                  LinearGeneral; its output (heads, head, D): row: dim 0
    kernel (k.., D, F)       column: last    row: last but one          convolutions
    bias                     column: dim 0   row: whole
    embedding (V, D)         vocab: dim 0;   a head's kernel (D, V): dim 1;  a bare matrix of neither name: the larger
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from .._errors import ShardingError
from .._plan import SHARED
from .._rules import (
    Draft,
    Leaf,
    as_patterns,
    check_patterns,
    fold_layers,
    is_torch_order,
    matches,
    role_of,
    vocab_dim_of,
    way_out,
)
from .._strategy import Strategy

SPLIT_NAMES = ("heads", "kv", "mlp", "vocab")
"""Logical dims that tensor parallelism splits."""

_USUAL = {
    "column": ("q", "k", "v", "qkv", "query", "key", "value", "up", "gate", "fc1", "wi", "c_fc", "c_attn", "in_proj"),
    "row": ("o", "out", "down", "fc2", "wo", "c_proj", "out_proj"),
    "vocab": ("embed", "embedding", "emb", "wte", "token_embed", "lm_head", "head"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TP(Strategy):
    """Split matrices over an axis: a column-parallel one makes a part of the features, a row-parallel one sums them.

    Moves, for each column/row pair: one all-reduce of the activations in the forward pass and one in the backward pass
    (with `sequence`: a reduce-scatter and an all-gather, the same bytes); weights never move. Memory: the named
    parameters, their gradients and optimiser state divide by the axis size, and so do the activations between the two.

    Args:
        axis: The axis.
        column: Patterns of modules whose outputs are split.
        row: Patterns of modules whose inputs are split.
        vocab: Patterns of embeddings and heads whose vocabulary is split; see `jp.embed` and `jp.cross_entropy`.
        heads: How many attention heads the outputs (or a row's inputs) of modules are: `{"*.[qo]": 32, "*.[kv]": 8}`.
            They are split by whole heads only. Where keys and values have fewer heads than the axis has devices, their
            matrices stay whole, every device makes all of these heads, and the gradient of the heads is summed.
        sequence: Also split the sequence dim of activations outside of the pairs (Korthikanti et al., 2022,
            arXiv:2205.05198): at `jp.constrain(x, "batch", "seq", ...)` and between the blocks of a `jp.Stack`.

    With no pattern at all the leaves' logical dims decide: `heads`, `kv`, `mlp` and `vocab` are split.

    Raises:
        ShardingError: When planning: an indivisible dim, a leaf that two lists match, a pattern that matches nothing,
            or nothing to split; then the error proposes the rules.

    Example:
        >>> plan = jp.plan(
        ...     lambda: {"up": jnp.ones((8, 32)), "down": jnp.ones((32, 8))},
        ...     jp.mesh(tensor=-1),
        ...     [jp.TP(column=["up"], row=["down"])],
        ... )
        >>> plan.records["up"].storage, plan.records["down"].storage
        (P(None, 'tensor'), P('tensor',))
    """

    phase: ClassVar[int] = 1

    axis: str = "tensor"
    column: str | Sequence[str] = ()
    row: str | Sequence[str] = ()
    vocab: str | Sequence[str] = ()
    heads: Mapping[str, int] | Sequence[tuple[str, int]] = ()
    sequence: bool = False

    def __post_init__(self) -> None:
        heads = dict(self.heads)
        for pattern, number in heads.items():
            if number < 1:
                raise ShardingError(f"TP: heads[{pattern!r}] is {number}. Use the number of heads, 1 or more.")
        object.__setattr__(self, "heads", tuple(heads.items()))  # hashable
        for field in ("column", "row", "vocab"):
            object.__setattr__(self, field, as_patterns(getattr(self, field), f"TP: {field}"))

    def apply(self, draft: Draft) -> None:
        for dim in ("heads", "kv", "mlp"):
            draft.split_dim(dim, self.axis)
        if self.sequence:
            draft.split_dim("seq", self.axis)
        patterns: dict[str, Sequence[str]] = {"column": self.column, "row": self.row, "vocab": self.vocab}
        before = len(draft.problems)
        for kind, given in patterns.items():
            draft.problems += check_patterns(given, draft.paths(), f"{self.label}: {kind}")
        given, unmatched = sum(map(len, patterns.values())), len(draft.problems) - before
        if unmatched and unmatched == given:
            draft.problems[-1] += f" {propose(draft)}"
        draft.problems += check_patterns([*dict(self.heads)], draft.paths(), f"{self.label}: heads")
        done, split = 0, []
        for leaf in draft.leaves.values():
            for dim, why in self._dims_of(leaf, patterns, draft):
                split.append(leaf.alias)
                done += self._split(leaf, dim, why, draft)
        for pattern in dict(self.heads):
            if any(matches(pattern, path) for path in draft.paths()) and not any(matches(pattern, at) for at in split):
                draft.problems.append(
                    f"{self.label}: heads[{pattern!r}] has no effect: {self.label} splits none of its leaves. Leave it "
                    "out."
                )
        if any("vocab" in (leaf.names or ()) for leaf in draft.leaves.values()) or self.vocab:
            draft.split_dim("vocab", self.axis)
        if not done and len(draft.problems) == before:
            draft.problems.append(f"{self.label} splits nothing. {propose(draft)}")

    def _dims_of(self, leaf: Leaf, patterns: Mapping[str, Sequence[str]], draft: Draft) -> list[tuple[int, str]]:
        """Each dim to split, with the reason."""
        found = [
            (kind, pattern) for kind, given in patterns.items() for pattern in given if matches(pattern, leaf.alias)
        ]
        kinds = {kind for kind, _ in found}
        named = [dim for dim, name in enumerate(leaf.names or ()) if name in SPLIT_NAMES][:1]
        if len(kinds) > 1:
            draft.problems.append(
                f"{leaf.path}: {found[0][0]}={found[0][1]!r} and {found[-1][0]}={found[-1][1]!r} both match. "
                "Make one of the patterns narrower."
            )
            return []
        if not kinds:
            leaf.role = role_of(leaf.names or (), named)
            return [(dim, f"its dim {(leaf.names or ())[dim]!r}") for dim in named]
        kind, pattern = found[0]
        dim = split_dim_of(leaf, kind)
        if dim is None:
            why = "added after the sum" if leaf.ndim else "a scalar"
            leaf.reasons.append((self.label, f"whole: {why} ({kind} {pattern!r})"))
            return []
        if named and named[0] != dim:
            draft.problems.append(
                f"{leaf.path}: {kind}={pattern!r} splits dim {dim}, but its dims {list(leaf.names or ())} say dim "
                f"{named[0]}. Drop the pattern or the dims."
            )
            return []
        if kind != "vocab" and leaf.ndim > 1 and leaf.name != "bias" and not _is_convolution(leaf):
            leaf.role = kind
        return [(dim, f"{kind} {pattern!r}")]

    def _split(self, leaf: Leaf, dim: int, why: str, draft: Draft) -> int:
        size, whole = draft.sizes[self.axis], leaf.shape[leaf.layers + dim]
        heads = self._heads_of(leaf, whole, draft)
        if heads is not None and heads < size and leaf.role != "row":
            leaf.role = SHARED if leaf.role else ""
            leaf.reasons.append(
                (self.label, f"whole: {heads} heads for {self.axis}={size}, all of them on each device")
            )
            return 0
        number, what = (whole, f"has size {whole}") if heads is None else (heads, f"is {heads} heads")
        if number % size:
            shared = _if_shared(leaf, whole) if heads is None and whole < size and leaf.role == "column" else ""
            draft.problems.append(
                f"{leaf.path}: dim {dim} {what}, but axis {self.axis!r} has size {size}, and {size} does not "
                f"divide {number}. {way_out(number, self.axis, size)}, or leave this leaf out of TP's patterns.{shared}"
            )
            return 0
        leaf.split(dim, self.axis, by=self.label, why=why)
        return 1

    def _heads_of(self, leaf: Leaf, size: int, draft: Draft) -> int | None:
        """Of how many heads the dim to split, of `size`, is made; `None` if nobody said."""
        found = {number: pattern for pattern, number in dict(self.heads).items() if matches(pattern, leaf.alias)}
        if len(found) > 1:
            first, *_, last = found.values()
            draft.problems.append(
                f"{leaf.path}: heads[{first!r}] and heads[{last!r}] both match and differ. Make one of the patterns "
                "narrower."
            )
        number = next(iter(found), None)
        if number and size % number:
            draft.problems.append(
                f"{leaf.path}: heads[{found[number]!r}] is {number}, which does not divide the {size} features that "
                "are to be split. Give the number of heads, not of features."
            )
            return None
        return number


def _if_shared(leaf: Leaf, number: int) -> str:
    return f" If devices may share them, TP(heads={{{leaf.module or leaf.alias!r}: {number}}})."


def split_dim_of(leaf: Leaf, kind: str) -> int | None:
    """The dim of `leaf` that a rule of this kind splits, within one block; `None` leaves it whole."""
    if kind == "vocab":
        return vocab_dim_of(leaf)
    if leaf.ndim == 0 or (kind == "row" and (leaf.ndim == 1 or leaf.name == "bias")):
        return None
    if leaf.ndim == 1 or leaf.name == "bias":  # of a LinearGeneral: (heads, head)
        return 0
    if is_torch_order(leaf):
        return int(kind == "row")
    if _is_convolution(leaf) or leaf.owner == "Linear":  # a Linear of 3 dims is vmapped
        return leaf.ndim - (2 if kind == "row" else 1)
    return int(kind == "column")


def _is_convolution(leaf: Leaf) -> bool:
    return leaf.ndim > 3 or "conv" in (leaf.owner or leaf.module.rpartition(".")[2]).lower()


def propose(draft: Draft) -> str:
    """Rules for these leaves, from the names that the field gives its layers."""
    found: dict[str, list[str]] = {"column": [], "row": [], "vocab": []}
    matrices = [leaf for leaf in draft.leaves.values() if leaf.ndim >= 2]
    for leaf in matrices:
        module = leaf.module if leaf.name in ("kernel", "weight", "embedding", "w") else leaf.alias
        last = module.rpartition(".")[2]
        for kind, usual in _USUAL.items():
            if last in usual and f"*.{last}" not in found[kind]:
                found[kind].append(f"*.{last}")
    rules = ", ".join(f"{kind}={names}" for kind, names in found.items() if names)
    if rules:
        return f"For this model, try TP({rules})."
    paths = fold_layers(leaf.alias for leaf in matrices)
    shapes = dict.fromkeys(f"{path} {leaf.shape}" for path, leaf in zip(paths, matrices, strict=True))
    shown = ", ".join(list(shapes)[:8]) + (", ..." if len(shapes) > 8 else "")
    return f"Name the modules to split, TP(column=[...], row=[...]); the matrices here are {shown or 'none'}."
