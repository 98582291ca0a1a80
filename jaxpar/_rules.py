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
from typing import TYPE_CHECKING, Any

from ._errors import ShardingError, listed, nearest
from ._types import Axes

if TYPE_CHECKING:
    from ._sequence import ContextSplit


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
            names = {part for path in paths for part in path.split(".") if not part.isdigit()}
            shown = list(dict.fromkeys(fold_layers(modules)))
            problems.append(
                f"{owner}: the pattern {pattern!r} matches none of {len(paths)} leaves.{nearest(last, names)} "
                f"Modules here are {', '.join(shown[:4])}{', ...' if len(shown) > 4 else ''}."
            )
    return problems


def fold_layers(paths: Iterable[str]) -> list[str]:
    """Paths with a `*` for each number: `blocks.*.q`."""
    return [re.sub(r"(?<![^.])\d+(?![^.])", "*", path) for path in paths]


FIELDS = ("storage", "compute", "gradient", "slots")
"""The fields of a leaf, and of a record, that say where it lies."""


@dataclasses.dataclass
class Leaf:
    """One leaf while strategies work on it: which axes split each of its dims, in storage, in use and in its slots.

    Attributes:
        path: Where it lives.
        alias: What patterns see of the path: not the `value` that Linen's boxes add.
        shape: Global shape.
        itemsize: Bytes an element.
        layers: Leading dims that stack equal blocks. Strategies see the dims after them; a pipeline splits the last.
        names: A logical name for each dim, or `None` where the model carries none.
        owner: The type name of the object that holds it as an attribute; `""` for an item of a dict or a list.
        role: `"column"` or `"row"` if tensor parallelism splits its outputs or its inputs; `""` otherwise.
        trainable: Whether it has a gradient and optimiser state.
        storage: Axes of each dim as stored between steps.
        compute: Axes of each dim as the model reads it.
        gradient: Axes of each dim of its gradient.
        slots: Axes of each dim of its optimiser state.
        reasons: `(strategy, what it did and why)`, in the order of phases.
    """

    path: str
    shape: tuple[int, ...]
    itemsize: int
    alias: str = ""
    layers: int = 0
    names: tuple[str | None, ...] | None = None
    owner: str = ""
    role: str = ""
    trainable: bool = True
    storage: list[Axes] = dataclasses.field(default_factory=list)
    compute: list[Axes] = dataclasses.field(default_factory=list)
    gradient: list[Axes] = dataclasses.field(default_factory=list)
    slots: list[Axes] = dataclasses.field(default_factory=list)
    reasons: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.alias = self.alias or self.path
        for field in FIELDS:
            setattr(self, field, [()] * len(self.shape))

    @property
    def name(self) -> str:
        """The last part of the path: `kernel`."""
        return self.alias.rpartition(".")[2]

    @property
    def module(self) -> str:
        """The path of what holds it: `blocks.0.q`."""
        return self.alias.rpartition(".")[0]

    @property
    def ndim(self) -> int:
        """Dims of one block's leaf, those that strategies may split."""
        return len(self.shape) - self.layers

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole leaf."""
        return math.prod(self.shape) * self.itemsize

    def split(
        self, dim: int, axis: str, *, by: str, why: str, where: Sequence[str] = FIELDS, outermost: bool = False
    ) -> None:
        """Split dim `dim` (counted after the layers) over `axis` in the fields named `where`, within what splits it."""
        for field in where:
            axes = getattr(self, field)
            so_far = axes[self.layers + dim]
            axes[self.layers + dim] = (axis, *so_far) if outermost else (*so_far, axis)
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
        context: How sequences are split, if they are.
        problems: What is wrong, each with its way out.
        inactive: Strategies that have nothing to do on this mesh, with the reason.
        notes: What a reader of the plan should know.
    """

    sizes: Mapping[str, int]
    leaves: dict[str, Leaf]
    dims: dict[str, Axes] = dataclasses.field(default_factory=dict)
    replicas: list[str] = dataclasses.field(default_factory=list)
    shards: list[str] = dataclasses.field(default_factory=list)
    context: "ContextSplit | None" = None
    problems: list[str] = dataclasses.field(default_factory=list)
    inactive: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def split_dim(self, dim: str, axis: str) -> None:
        """Split the logical dim `dim` of activations over `axis` too."""
        self.dims[dim] = (*self.dims.get(dim, ()), axis)

    def free_size(self, leaf: Leaf, dim: int, field: str = "storage") -> int:
        """The size of one device's piece of a dim, as `leaf` has split it in `field` so far."""
        taken = math.prod(self.sizes[axis] for axis in getattr(leaf, field)[leaf.layers + dim])
        return leaf.shape[leaf.layers + dim] // taken

    def paths(self) -> list[str]:
        """The paths of all leaves, as patterns see them."""
        return [leaf.alias for leaf in self.leaves.values()]

    def raise_problems(self) -> None:
        """Raise one `ShardingError` with every problem, if there is any."""
        if self.problems:
            problems = _alike(self.problems)
            head = "" if len(problems) == 1 else f"{len(problems)} problems:\n"
            raise ShardingError(head + listed(problems))


def _alike(problems: Sequence[str]) -> list[str]:
    """Problems that differ only in the number of a layer, as one."""
    groups: dict[str, list[str]] = {}
    for problem in problems:
        groups.setdefault(re.sub(r"\b(?<![^.\s\"'])\d+(?=\.\w|[:\"'])", "#", problem), []).append(problem)
    return [same[0] + _others(len(same) - 1) for same in groups.values()]


def _others(number: int) -> str:
    return f" (And so for {number} other layer{'s' if number > 1 else ''}.)" if number else ""


def largest_divisible(leaf: Leaf, draft: Draft, size: int, *, field: str) -> int | None:
    """The dim of `leaf` with the largest free size that `size` divides, dims that nobody has split first.

    A dim named `layers` that is not the first is left whole: a scan takes it apart.
    """
    axes = getattr(leaf, field)
    best: tuple[bool, int, int] | None = None
    for dim in range(leaf.ndim):
        taken, free = axes[leaf.layers + dim], draft.free_size(leaf, dim, field)
        if free % size == 0 and free > 0 and (leaf.names or [None] * leaf.ndim)[dim] not in LAYERS:
            candidate = (not taken, free, -dim)
            best = max(best, candidate) if best else candidate
    return None if best is None else -best[2]


def is_table(leaf: Leaf) -> bool:
    """Whether the rows of `leaf` are looked up by index, as far as its dims or its names tell."""
    if leaf.names is not None:
        return leaf.names[:1] == ("vocab",)
    return leaf.ndim == 2 and leaf.name != "kernel" and leaf.owner != "Linear" and is_called_embedding(leaf)


def vocab_dim_of(leaf: Leaf) -> int | None:
    """The dim of an embedding or a head, or of its bias, that counts the vocabulary; `None` for a scalar."""
    if leaf.ndim == 0:
        return None
    if leaf.ndim == 1 or leaf.name == "bias" or is_torch_order(leaf) or is_called_embedding(leaf):
        return 0
    names = [part.lower() for part in (leaf.owner, *leaf.alias.split(".")[-2:])]
    if leaf.name == "kernel" or any("head" in name or name.startswith("unemb") for name in names):
        return leaf.ndim - 1
    return int(leaf.shape[-1] > leaf.shape[leaf.layers])


def is_torch_order(leaf: Leaf) -> bool:
    """Whether the matrix is (out, in), as torch and Equinox have it."""
    return leaf.name == "weight" and leaf.owner != ""


def as_patterns(given: str | Sequence[Any], owner: str) -> tuple[str, ...]:
    """Patterns as a tuple.

    Raises:
        ShardingError: One is no string.
    """
    patterns = (given,) if isinstance(given, str) else tuple(given)
    wrong = [pattern for pattern in patterns if not isinstance(pattern, str)]
    if wrong:
        raise ShardingError(f"{owner} holds {wrong[0]!r}, which is no pattern. Use strings such as '*.q'.")
    return patterns


def is_called_embedding(leaf: Leaf) -> bool:
    """Whether the leaf, what holds it, or the type of that is called an embedding."""
    names = [part.lower() for part in (leaf.owner, *leaf.alias.split(".")[-2:])]
    called_so = any(name.startswith("emb") or name.endswith(("embed", "embedding", "wte")) for name in names)
    return called_so and not any(name.startswith("unemb") for name in names)


def role_of(names: Sequence[str | None], split: Sequence[int]) -> str:
    """Whether dims named so make a matrix whose outputs are split or whose inputs are: `("embed", "mlp")` is column.

    Args:
        names: Of one block's leaf.
        split: The dims that are, or would be, split by tensor parallelism.
    """
    if not split or "embed" not in names or names[split[0]] == "vocab":
        return ""
    role = "column" if names.index("embed") < split[0] else "row"
    return f"{EXPERT} {role}" if EXPERT in names else role


def way_out(size: int, axis: str, axis_size: int) -> str:
    """How to make a dim of `size` fit an axis: the nearest multiples."""
    below = size // axis_size * axis_size
    nearest_sizes = f"{below} or {below + axis_size}" if below else f"{axis_size}"
    return f"Use a multiple of {axis_size} ({nearest_sizes} here), or another size of axis {axis!r}"


EXPERT = "expert"
"""The name of the dim of a leaf that stacks experts, its first."""

KNOWN = ("embed", EXPERT, "heads", "kv", "mlp", "vocab")
"""Names of dims of parameters that strategies read."""

LAYERS = ("layers", "layer")
"""Names of a dim that stacks equal blocks."""


def as_rules(dims: Sequence[Any]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """`(path pattern, dims)` rules as hashable values.

    Raises:
        ShardingError: A rule is not a pattern and names of dims, perhaps with `...` at the end.
    """
    rules = []
    for rule in dims:
        try:
            pattern, names = rule
            fine = isinstance(pattern, str) and not isinstance(names, str)
            names = tuple(names)
        except (TypeError, ValueError):
            fine, names, pattern = False, (), ""
        if not fine or not all(name is None or isinstance(name, str) for name in names if name is not ...):
            raise ShardingError(
                f"dims: {rule!r} is not a rule. Write (pattern, names), as in ('*.q.kernel', ('embed', 'heads')), None "
                "for a dim without a name, and ... last for all that follow."
            )
        rules.append((pattern, names))
    return tuple(rules)


def name_dims(leaves: Mapping[str, Leaf], rules: Sequence[tuple[str, tuple[Any, ...]]]) -> list[str]:
    """Give leaves the logical dims of the rules that match them; return what is wrong with the rules.

    A first name `layers` is taken off: it says that the leaf stacks equal blocks.
    """
    problems = check_patterns([pattern for pattern, _ in rules], [leaf.alias for leaf in leaves.values()], "dims")
    for leaf in leaves.values():
        found = {names: pattern for pattern, names in reversed(rules) if matches(pattern, leaf.alias)}
        if len(found) > 1:
            first, second = (repr(pattern) for pattern in list(found.values())[:-3:-1])
            problems.append(f"{leaf.path}: the rules {first} and {second} both match and differ. Make one narrower.")
        elif found:
            names, pattern = next(iter(found.items()))
            problems += _name(leaf, names, f"the rule {pattern!r}")
    return problems


def check_names(leaves: Mapping[str, Leaf]) -> list[str]:
    """A complaint for each leaf whose model names another number of dims than it has."""
    return [
        f"{leaf.path}: the model names {len(leaf.names)} dims {list(leaf.names)}, but the leaf has {leaf.ndim}, of "
        f"shape {leaf.shape[leaf.layers :]}. If a vmap stacks it, name that dim: "
        "nnx.vmap(..., transform_metadata={nnx.PARTITION_NAME: 'layers'})."
        for leaf in leaves.values()
        if leaf.names is not None and len(leaf.names) != leaf.ndim
    ]


def unused_names(leaves: Mapping[str, Leaf]) -> list[str]:
    """A note of the names of dims that no strategy reads."""
    found: dict[str, int] = {}
    for leaf in leaves.values():
        for name in {*(leaf.names or ())} - {None, *KNOWN, *LAYERS}:
            found[str(name)] = found.get(str(name), 0) + 1
    shown = ", ".join(f"{name!r} ({number} leaves)" for name, number in sorted(found.items()))
    return [f"dims named {shown} mean nothing to any strategy; they read {', '.join(KNOWN)}."] if found else []


def _name(leaf: Leaf, names: tuple[Any, ...], source: str) -> list[str]:
    """Name the dims of `leaf`; a list of what is wrong with that."""
    ndim = len(leaf.shape)
    if names[:1] and names[0] not in LAYERS and leaf.layers:
        names = (LAYERS[0], *names)  # the plan has stacked these blocks: the rule was written for one
    if names[-1:] == (...,) and len(names) - 1 <= ndim:
        names = (*names[:-1], *[None] * (ndim - len(names) + 1))
    if len(names) != ndim or ... in names:
        wrong = (
            f"{leaf.path}: {source} names {len(names)} dims {list(names)}, but the leaf has {ndim}, of shape "
            f"{leaf.shape}. Name each dim, None for one without a name."
        )
        return [wrong]
    leaf.layers = int(names[:1] != () and names[0] in LAYERS)
    leaf.names = names[leaf.layers :]
    return []


Predicate = Callable[[str], bool]


def predicate(chosen: Any) -> Predicate:
    """A test of paths from a pattern, several, or a function of a path; `None` chooses all."""
    if chosen is None:
        return lambda path: True
    if callable(chosen):
        return lambda path: bool(chosen(path))
    patterns = (chosen,) if isinstance(chosen, str) else tuple(chosen)
    return lambda path: any(matches(pattern, path) for pattern in patterns)
