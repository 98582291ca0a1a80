"""How a leaf finds its axes: path patterns, logical dims, and a draft in which strategies say who splits what, and why.

A *pattern* matches a dotted path, `*` standing for anything, dots included: `*.q` matches the module `blocks.0.attn.q`
and so its `kernel` and `bias`, and a bare leaf named `q`. Strategies work on a `Draft`, in the fixed order of their
phases, so the order in which they are listed changes nothing. All that goes wrong is gathered there and raised at once.
"""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ._errors import ShardingError, listed, nearest
from ._types import Axes


def matches(pattern: str, path: str) -> bool:
    """Whether `pattern` names the leaf `path`, or the module that holds it.

    Example:
        >>> from jaxpar._rules import matches
        >>> matches("*.q", "blocks.0.attn.q.kernel"), matches("*.q", "q"), matches("*.q", "blocks.0.kq.kernel")
        (True, True, False)
    """
    module = path.rpartition(".")[0]
    return any(
        fnmatch.fnmatchcase(candidate, pattern) for name in (path, module) if name for candidate in (name, f".{name}")
    )


def check_patterns(patterns: Iterable[str], paths: Sequence[str], owner: str) -> list[str]:
    """A complaint for each of `patterns` that matches none of `paths`."""
    modules = sorted({path.rpartition(".")[0] or path for path in paths})
    problems = []
    for pattern in patterns:
        if not any(matches(pattern, path) for path in paths):
            last = pattern.rpartition(".")[2]
            names = {part for module in modules for part in module.split(".")}
            problems.append(
                f"{owner}: the pattern {pattern!r} matches none of {len(paths)} leaves.{nearest(last, names)} "
                f"Modules here are {', '.join(modules[:4])}{', ...' if len(modules) > 4 else ''}."
            )
    return problems


@dataclasses.dataclass
class Leaf:
    """One leaf while strategies work on it: which axes split each of its dims, in storage, in use and in its slots.

    Attributes:
        path: Where it lives.
        shape: Global shape.
        itemsize: Bytes an element.
        layers: Leading dims that stack equal blocks: 0 or 1. Never split; strategies see the dims after them.
        names: A logical name for each dim, or `None` where the model carries none.
        owner: The type name of the module that holds it, or `""`.
        storage: Axes of each dim as stored between steps.
        compute: Axes of each dim as the model reads it.
        gradient: Axes of each dim of its gradient.
        slots: Axes of each dim of its optimiser state.
        reasons: `(strategy, what it did and why)`, in the order of phases.
    """

    path: str
    shape: tuple[int, ...]
    itemsize: int
    layers: int = 0
    names: tuple[str | None, ...] | None = None
    owner: str = ""
    trainable: bool = True
    storage: list[Axes] = dataclasses.field(default_factory=list)
    compute: list[Axes] = dataclasses.field(default_factory=list)
    gradient: list[Axes] = dataclasses.field(default_factory=list)
    slots: list[Axes] = dataclasses.field(default_factory=list)
    reasons: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        for field in ("storage", "compute", "gradient", "slots"):
            setattr(self, field, [()] * len(self.shape))

    @property
    def name(self) -> str:
        """The last part of the path: `kernel`."""
        return self.path.rpartition(".")[2]

    @property
    def ndim(self) -> int:
        """Dims of one block's leaf, those that strategies may split."""
        return len(self.shape) - self.layers

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole leaf."""
        return math.prod(self.shape) * self.itemsize

    def split(self, dim: int, axis: str, *, by: str, why: str, where: Sequence[str]) -> None:
        """Split dim `dim` (counted after the layers) over `axis` in the fields named `where`."""
        for field in where:
            axes = getattr(self, field)
            axes[self.layers + dim] = (*axes[self.layers + dim], axis)
        self.reasons.append((by, why))


@dataclasses.dataclass
class Draft:
    """A plan in the making: leaves, the axes of logical dims of activations, and every problem met so far.

    Attributes:
        sizes: Size of each mesh axis.
        leaves: The parameters, by path.
        dims: Axes of each logical dim of activations: `{"batch": ("data", "fsdp"), "mlp": ("tensor",)}`.
        replicas: Axes over which parameters are replicated and the batch is split.
        shards: Axes over which parameters and the batch are both split.
        problems: What is wrong, each with its way out.
        inactive: Strategies that have nothing to do on this mesh, with the reason.
        notes: What a reader of the plan should know.
    """

    sizes: Mapping[str, int]
    leaves: dict[str, Leaf]
    dims: dict[str, Axes] = dataclasses.field(default_factory=dict)
    replicas: list[str] = dataclasses.field(default_factory=list)
    shards: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    inactive: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    used: dict[str, str] = dataclasses.field(default_factory=dict)

    def split_dim(self, dim: str, axis: str) -> None:
        """Split the logical dim `dim` of activations over `axis` too."""
        self.dims[dim] = (*self.dims.get(dim, ()), axis)

    def free_size(self, leaf: Leaf, dim: int, axes: Axes = ()) -> int:
        """The size of one device's piece of a dim that `leaf` has split so far, or that `axes` split."""
        taken = math.prod(self.sizes[axis] for axis in (axes or leaf.storage[leaf.layers + dim]))
        return leaf.shape[leaf.layers + dim] // taken

    def raise_problems(self) -> None:
        """Raise one `ShardingError` with every problem, if there is any."""
        if self.problems:
            number = len(self.problems)
            head = "" if number == 1 else f"{number} problems:\n"
            raise ShardingError(head + listed(_alike(self.problems)))


def _alike(problems: Sequence[str]) -> list[str]:
    """Problems that differ only in the number of a layer, as one."""
    groups: dict[str, list[str]] = {}
    for problem in problems:
        groups.setdefault(re.sub(r"\.\d+\.", ".#.", problem), []).append(problem)
    return [same[0] + (f" (So do {len(same) - 1} other layers.)" if len(same) > 1 else "") for same in groups.values()]


def largest_divisible(leaf: Leaf, draft: Draft, size: int, *, field: str) -> int | None:
    """The dim of `leaf` with the largest free size that `size` divides, dims that nobody has split first."""
    axes = getattr(leaf, field)
    best: tuple[bool, int, int] | None = None
    for dim in range(leaf.ndim):
        taken = axes[leaf.layers + dim]
        free = leaf.shape[leaf.layers + dim] // math.prod(draft.sizes[axis] for axis in taken)
        if free % size == 0 and free > 0:
            candidate = (not taken, free, -dim)
            best = max(best, candidate) if best else candidate
    return None if best is None else -best[2]


def way_out(size: int, axis: str, axis_size: int) -> str:
    """How to make a dim of `size` fit an axis: the nearest multiples."""
    below = size // axis_size * axis_size
    nearest_sizes = f"{below} or {below + axis_size}" if below else f"{axis_size}"
    return f"Use a multiple of {axis_size} ({nearest_sizes} here), or another size of axis {axis!r}"


def as_rules(dims: Sequence[tuple[str, Sequence[str | None]]]) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
    """`(path pattern, dims)` rules as hashable values."""
    return tuple((pattern, tuple(names)) for pattern, names in dims)


def name_dims(leaves: Mapping[str, Leaf], rules: Sequence[tuple[str, tuple[str | None, ...]]]) -> list[str]:
    """Give leaves the logical dims of the rules that match them; return what is wrong with the rules."""
    problems = check_patterns([pattern for pattern, _ in rules], list(leaves), "dims")
    for leaf in leaves.values():
        found = [(pattern, names) for pattern, names in rules if matches(pattern, leaf.path)]
        distinct = {names for _, names in found}
        if len(distinct) > 1:
            problems.append(
                f"{leaf.path}: the rules {found[0][0]!r} and {found[1][0]!r} both match and differ. Make one narrower."
            )
        elif found and len(found[0][1]) != leaf.ndim:
            problems.append(
                f"{leaf.path}: the rule {found[0][0]!r} names {len(found[0][1])} dims {list(found[0][1])}, but the "
                f"leaf "
                f"has {leaf.ndim}, of shape {leaf.shape[leaf.layers :]}. Name each dim, None for one without a name."
            )
        elif found:
            leaf.names = found[0][1]
    return problems


Predicate = Callable[[str], bool]


def predicate(chosen: Any) -> Predicate:
    """A test of paths from a pattern, several, or a function of a path; `None` chooses all."""
    if chosen is None:
        return lambda path: True
    if callable(chosen):
        return lambda path: bool(chosen(path))
    patterns = (chosen,) if isinstance(chosen, str) else tuple(chosen)
    return lambda path: any(matches(pattern, path) for pattern in patterns)
