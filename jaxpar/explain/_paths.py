"""From the name that JAX gave an operation to where in the model it was made, and in which phase of the step.

A name is a path of scopes: `jit(f)/transpose(jvp(blocks))/while/body/closed_call/checkpoint/each/attn/q/dot_general`.
Modules open scopes (Linen itself, NNX under `plan.jit`), and so do transformations, loops, jitted library functions and
einsums, which say nothing of the model and are left out. A compiler that merges operations writes their names as one,
`each/attn/(q/dot_general:k/dot_general)`; then the path is what they share.

Where the parameters of the program are known, a path is spelt as theirs are: Linen's scopes start with the class of the
model and lack `params`, and a compiler may drop the first scopes of a name.
"""

import dataclasses
import functools as ft
import re
from collections.abc import Iterable

from .._hlo._flops import FILLED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Where an operation comes from.

    Attributes:
        path: The module, or the parameter that a plan moves, in the spelling of plans: `blocks.each.attn.q`.
        phase: `"forward"`, `"backward"`, `"recomputed"` (the forward pass again, for the backward one), `"update"`, or
            `""` for none of these: no gradient is taken around it, as in the batch's preparation.
        primitive: What JAX calls the operation, `"dot_general"`; `""` if the name does not end in that.
    """

    path: str
    phase: str
    primitive: str


class Paths:
    """Origins of operations in a program with parameters at `known` paths (none, where they are not known).

    Example:
        >>> paths = Paths(["blocks.each.attn.q.kernel"])
        >>> paths.of("jit(step)/transpose(jvp(blocks))/while/body/closed_call/checkpoint/each/attn/q/dot_general")
        Origin(path='blocks.each.attn.q', phase='backward', primitive='dot_general')
    """

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._leaves = set(known)
        self._tails = _tails(self._leaves)
        self._found: dict[str, Origin] = {}

    def of(self, op_name: str) -> Origin:
        """The origin of the operation that is called `op_name`. Anything is a name; garbage has no path."""
        if op_name not in self._found:
            self._found[op_name] = self._of(op_name)
        return self._found[op_name]

    def _of(self, op_name: str) -> Origin:
        scopes, phase, primitive = _read(op_name)
        path = ".".join(scopes)
        for at in range(len(scopes) - 1, -1, -1):
            if scopes[at].startswith("@"):
                return Origin(path=scopes[at][1:], phase=phase, primitive=primitive)
        return Origin(path=self._spelt(scopes) or path, phase=phase, primitive=primitive)

    def _spelt(self, scopes: tuple[str, ...]) -> str:
        """As the parameters spell it: by the longest run of scopes that is the end of one known module's path."""
        for length in range(len(scopes), 0, -1):
            for start in range(len(scopes) - length + 1):
                module = self._tails.get(scopes[start : start + length])
                if module:
                    return ".".join((module, *scopes[start + length :]))
        return ""


def _tails(leaves: Iterable[str]) -> dict[tuple[str, ...], str]:
    """Each end of a module's path to the module; `""` where several modules end so and none is it whole."""
    modules = {tuple(leaf.split(".")[:end]) for leaf in leaves for end in range(1, leaf.count(".") + 1)}
    tails: dict[tuple[str, ...], str] = {}
    for module in modules:
        for start in range(len(module)):
            tail = module[start:]
            if tail in modules and start:
                continue
            tails[tail] = ".".join(module) if start == 0 or tail not in tails else ""
    return tails


_STRUCTURE = re.compile(
    r"while|body|cond|closed_call|checkpoint|rematted_computation|remat2?|eval_jaxpr|core_call|shard_map|pjit|scan|"
    r"custom_[jv]+p_call(_jaxpr)?|custom_lin|linear_call|RngStream\.__call__|branch_\d+_fun|xla_call|pallas_call|main|update|vmap|jvp|transpose|call_exported|"
    r"pipeline_(enters|forward|leaves|backward|done)|" + FILLED.format(r"\d+", r"\d+")
)
_WRAPPED = re.compile(r"([\w\-]*)\((.*)\)", re.DOTALL)
_MERGED = re.compile(r"\([^(].*\)", re.DOTALL)
_OPENED = re.compile(r"(\w+)\(")  # of a name that a compiler cut short
_SCOPE = re.compile(r"@?[\w.\-]+")  # an einsum's letters have commas and an arrow
_TRANSFORMS = ("jvp", "transpose", "vmap", "remat", "checkpoint", "linearize", "named")


@ft.lru_cache(maxsize=65536)
def _read(op_name: str) -> tuple[tuple[str, ...], str, str]:
    """The model's scopes, the phase and the primitive."""
    name = op_name.partition(";")[0]  # a compiler joins the names of what it made one of; the first leads
    parts = _split(name, "/")
    found: list[str] = []
    phase, primitive = "", ""
    for index, part in enumerate(parts):
        if _MERGED.fullmatch(part):
            members = [_read("/".join((*parts[:index], each))) for each in _split(part[1:-1], ":")]
            scopes = _shared([scopes for scopes, _, _ in members])
            phases = {phase for _, phase, _ in members}
            # Gradients are summed together with the loss.
            phase = "backward" if "backward" in phases else _same(phases)
            return scopes, phase, _same(primitive for *_, primitive in members)
        names, wrappers = _unwrapped(part) if part.count("(") == part.count(")") else ([], tuple(_OPENED.findall(part)))
        if "transpose" in wrappers:
            phase = phase if phase == "recomputed" else "backward"
        elif "jvp" in wrappers and phase in ("", "backward"):  # a backward pass that differentiates runs it again
            phase = "recomputed" if phase or "pipeline_backward" in parts[:index] else "forward"
        elif part == "rematted_computation":
            phase = "recomputed"
        elif part == "update" and not phase and len(found) == 0:
            phase = "update"
        last = index == len(parts) - 1
        if last and index and not wrappers and _is_primitive(part):
            primitive = part
        else:
            found += [each for each in names if _SCOPE.fullmatch(each) and not _STRUCTURE.fullmatch(each)]
    return tuple(found) if len(parts) > 1 else (), phase, primitive  # a name alone is a compiler's or an argument's


def _same(values: Iterable[str]) -> str:
    """The value that all are; nothing if they differ."""
    different = set(values)
    return different.pop() if len(different) == 1 else ""


def _unwrapped(part: str) -> tuple[list[str], tuple[str, ...]]:
    """What is inside of the transformations that wrap a scope, and these; nothing is inside of a jitted function."""
    wrappers: list[str] = []
    while wrapped := _WRAPPED.fullmatch(part):
        wrappers.append(wrapped.group(1))
        if wrapped.group(1) not in _TRANSFORMS:
            return [], tuple(wrappers)
        part = wrapped.group(2)
    return [each for each in part.split("/") if each], tuple(wrappers)


def _split(text: str, mark: str) -> list[str]:
    """The parts of `text` between marks that are in no parentheses."""
    parts, depth, begin = [], 0, 0
    for at, each in enumerate(text):
        depth += (each in "([{") - (each in ")]}")
        if each == mark and depth <= 0:
            parts.append(text[begin:at])
            begin = at + 1
    parts.append(text[begin:])
    return [part for part in parts if part]


def _shared(paths: list[tuple[str, ...]]) -> tuple[str, ...]:
    """What paths have in common from the start."""
    shared = []
    for level in zip(*paths, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return tuple(shared)


@ft.cache
def _primitives() -> frozenset[str]:
    from jax.extend.core import primitives

    return frozenset(
        each.name for name, each in vars(primitives).items() if name.endswith("_p") and hasattr(each, "name")
    )


_MORE_PRIMITIVES = frozenset({
    "add_any", "axis_index", "convert_element_type", "dynamic_slice", "dynamic_update_slice", "iota_2x32_shape",
    "pbroadcast", "pcast", "psum_invariant", "pvary", "ragged_dot_general", "reduce_scatter", "sharding_constraint",
    "split", "square",
})  # fmt: skip


def _is_primitive(name: str) -> bool:
    return name in _MORE_PRIMITIVES or name in _primitives() or "-" in name  # HLO's own words have hyphens
