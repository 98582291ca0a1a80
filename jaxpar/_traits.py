"""What a loss or a step does, read off its jaxpr: which decides how gradients may be accumulated.

Mapping a loss over replicas (`vmap`) is not right for every loss: a convolution's weight gradient would gather
activations, `ragged_dot` cannot be mapped, a random mask that does not depend on the sample would repeat on each
replica, and state that the loss changes (batch statistics) would become the replica's own.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core as jax_core

from ._compat import scan_counts

UNMAPPABLE = {"conv_general_dilated": "a convolution", "ragged_dot": "ragged_dot", "ragged_dot_general": "ragged_dot"}
RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """What stands in the way of mapping a loss over replicas.

    Attributes:
        unmappable: An operation that `vmap` makes slow or impossible, in words, or `None`.
        repeats_random: Whether it draws random numbers that do not depend on the sample.
        changes_state: Whether it changes its state.
        draws: Whether it draws random numbers at all.
    """

    unmappable: str | None
    repeats_random: bool
    changes_state: bool
    draws: bool


def traits_of(closed: Any, num_before: int, num_batch: int, num_state: int, state_at: int) -> Traits:
    """The traits of a loss's jaxpr.

    Args:
        closed: Its closed jaxpr.
        num_before: How many inputs come before those of the batch.
        num_batch: How many inputs are the batch's.
        num_state: How many of its last outputs are its state after the call.
        state_at: Where the same state begins among its inputs.
    """
    jaxpr = closed.jaxpr
    before = jaxpr.invars[state_at : state_at + num_state]
    after = jaxpr.outvars[len(jaxpr.outvars) - num_state :] if num_state else []
    changes = any(x is not y for x, y in zip(before, after, strict=True))
    depends = [num_before <= index < num_before + num_batch for index in range(len(jaxpr.invars))]
    found = find(jaxpr, UNMAPPABLE)
    return Traits(
        unmappable=UNMAPPABLE[found] if found else None,
        repeats_random=_draws_alike(jaxpr, depends),
        changes_state=changes,
        draws=find(jaxpr, RANDOM) is not None,
    )


def contracted(jaxpr: Any) -> set[int]:
    """Which inputs reach a matrix product, a convolution or a lookup as they are, nothing said of where to gather them.

    What optimisers and averages do to a parameter, element by element, is none of these.
    """
    found: set[int] = set()

    def meet(eqn: Any, given: set[Any]) -> set[Any] | None:
        if eqn.primitive.name in _CONTRACTIONS:
            found.update(given)
        return set() if eqn.primitive.name == "sharding_constraint" else None

    _follow(jaxpr, [{index} for index in range(len(jaxpr.invars))], meet)
    return found


def tags_met(jaxpr: Any, tags: Sequence[str]) -> dict[int, set[tuple[str, ...]]]:
    """By input that is given any of the names `tags` (`checkpoint_name`), whole or in pieces: which, one after another.

    `{0: {("read",)}, 1: {("read",), ("read", "read")}}`: of what was read of input 1, something was read once more.
    """
    found: dict[int, set[tuple[str, ...]]] = {}

    def meet(eqn: Any, given: set[Any]) -> set[Any] | None:
        tag = next((tag for tag in tags if _is_tag(eqn, tag)), None)
        if tag is None:
            return None
        met = {(index, (*before, tag)) for index, before in given}
        for index, names in met:
            found.setdefault(index, set()).add(names)
        return met

    _follow(jaxpr, [{(index, ())} for index in range(len(jaxpr.invars))], meet)
    return found


def kept_by_scans(jaxpr: Any, tag: str) -> bool:
    """Whether a scan hands out, of each of its rounds, what comes from an input and has the name `tag` inside."""
    found = []

    def meet(eqn: Any, _: set[Any]) -> set[Any] | None:
        return {tag} if _is_tag(eqn, tag) else None

    def leave(eqn: Any, outputs: list[set[Any]]) -> None:
        if eqn.primitive.name == "scan":
            found.extend(tag in each for each in outputs[scan_counts(eqn.params)[1] :])

    _follow(jaxpr, [{"input"} for _ in jaxpr.invars], meet, leave)
    return any(found)


def _is_tag(eqn: Any, tag: str) -> bool:
    return eqn.primitive.name == "name" and eqn.params["name"] == tag


def looked_up(jaxpr: Any) -> set[int]:
    """Which inputs reach a lookup by index, as they are or gathered: tables, and the indices."""
    found: set[int] = set()

    def meet(eqn: Any, given: set[Any]) -> set[Any] | None:
        if eqn.primitive.name == "gather":
            found.update(given)
        return set() if eqn.primitive.name in _CONTRACTIONS else None

    _follow(jaxpr, [{index} for index in range(len(jaxpr.invars))], meet)
    return found


_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")
_CONTRACTIONS = (*_PRODUCTS, "gather")
_PIECES = ("slice", "dynamic_slice", "squeeze", "split")


def _follow(
    jaxpr: Any,
    inputs: list[set[Any]],
    meet: Callable[[Any, set[Any]], set[Any] | None],
    leave: Callable[[Any, list[set[Any]]], None] = lambda eqn, outputs: None,
) -> list[set[Any]]:
    """What each output of `jaxpr` still is, given what each input is: arrays, or pieces of them, as they are.

    Args:
        jaxpr: What is followed, insides of its equations too.
        inputs: Labels of each input.
        meet: Called with an equation that is given something labelled, and its labels; says what its outputs are,
            `None` for what follows from their sizes.
        leave: Called with an equation and the labels of what a jaxpr inside of it gives.
    """
    is_of = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(var: Any) -> set[Any]:
        return set() if isinstance(var, jax_core.Literal) else is_of.get(var, set())

    for eqn in jaxpr.eqns:
        given = [of(var) for var in eqn.invars]
        if not any(given):
            continue
        said = meet(eqn, set().union(*given))
        if said is not None:
            is_of |= dict.fromkeys(eqn.outvars, said)
            continue
        for sub in _subs(eqn):
            inner = given[-len(sub.invars) :] if len(sub.invars) <= len(given) else [set() for _ in sub.invars]
            outputs = _follow(sub, inner, meet, leave)
            leave(eqn, outputs)
            if len(outputs) == len(eqn.outvars):
                is_of |= {var: of(var) | out for var, out in zip(eqn.outvars, outputs, strict=True)}
        if not _subs(eqn) and eqn.primitive.name not in _CONTRACTIONS:
            for out in eqn.outvars:
                alike = [
                    origin
                    for var, origin in zip(eqn.invars, given, strict=True)
                    if var.aval.size == out.aval.size or eqn.primitive.name in _PIECES
                ]
                is_of[out] = set().union(*alike)
    return [of(var) for var in jaxpr.outvars]


def _subs(eqn: Any) -> list[Any]:
    """The jaxprs inside an equation."""
    found = []
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, jax_core.ClosedJaxpr):
                found.append(each.jaxpr)
            elif isinstance(each, jax_core.Jaxpr):
                found.append(each)
    return found


def bytes_made(jaxpr: Any) -> int:
    """Bytes of all that `jaxpr` computes on the way, a loop's rounds in one place: no less than it holds at once."""
    made = [var.aval for eqn in jaxpr.eqns for var in eqn.outvars if hasattr(var.aval, "size")]
    inside = sum(bytes_made(sub) for eqn in jaxpr.eqns for sub in _subs(eqn))
    return sum(each.size * each.dtype.itemsize for each in made) + inside


def find(jaxpr: Any, names: Any) -> str | None:
    """The first primitive of `jaxpr`, insides too, whose name is among `names`."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in names:
            return eqn.primitive.name
        if eqn.primitive.name == "custom_vmap_call":  # says itself how it is mapped (`_grouped`)
            continue
        for sub in _subs(eqn):
            found = find(sub, names)
            if found:
                return found
    return None


def _draws_alike(jaxpr: Any, depends: Sequence[bool]) -> bool:
    """Whether random bits are drawn from a key that does not depend on the inputs that `depends` marks."""
    return _met_alone(jaxpr, depends, lambda eqn: eqn.primitive.name in RANDOM)


def named_alone(jaxpr: Any, tag: str) -> bool:
    """Whether something with the name `tag` (`checkpoint_name`) depends on no input at all."""
    return _met_alone(jaxpr, [True] * len(jaxpr.invars), lambda eqn: _is_tag(eqn, tag), unknown=True)


def _met_alone(jaxpr: Any, depends: Sequence[bool], wanted: Callable[[Any], bool], *, unknown: bool = False) -> bool:
    """Whether a `wanted` equation, insides too, depends on none of the inputs that `depends` marks.

    What an inner jaxpr is given where nobody can tell which is which, does or not as `unknown` says.
    """
    marked = {var for var, mark in zip(jaxpr.invars, depends, strict=True) if mark}
    for eqn in jaxpr.eqns:
        inputs = [not isinstance(var, jax_core.Literal) and var in marked for var in eqn.invars]
        if wanted(eqn) and not any(inputs):
            return True
        for sub in _subs(eqn):
            # Loops and calls pass their inputs on in order; where the count differs (cond's index, while's consts) the
            # last ones line up.
            inner = inputs[-len(sub.invars) :] if len(sub.invars) <= len(inputs) else [unknown] * len(sub.invars)
            if _met_alone(sub, inner, wanted, unknown=unknown):
                return True
        if any(inputs):
            marked.update(eqn.outvars)
    return False
