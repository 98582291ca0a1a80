"""Which saved leaf becomes which leaf of the reader.

Leaves have the same path, or differ in how a stack of equal layers is laid out: a scan keeps `blocks.each.up.kernel`
with a leading dim of layers (`Stack`, `FSDP(blocks=...)`), or a pytree `blocks.up.kernel`; without it there is one leaf
a layer, `blocks.0.up.kernel` or, in Linen, `blocks_0.up.kernel`. These are the same parameters under the same logical
name, in optimiser state too, so either is read as the other. Only a full set of layers with exact shapes is. A pipeline
with several chunks on a stage (`PP(chunks=2)`) keeps a stack as [chunks, layers of a chunk, ...], in the same order.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Mapping

from .._errors import CheckpointError, listed
from ._about import Leaf

MOST_LINES = 100  # of a mismatch; a deep model that is not the saved one differs in thousands of leaves
EACH = "each"  # where a `Stack` holds its block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """How the leaves of a reader are made of saved ones.

    Attributes:
        same: Path here, path in the checkpoint.
        stacked: Path here of a stack, paths in the checkpoint of its layers.
        sliced: Path in the checkpoint of a stack, paths here of its layers.
    """

    same: Mapping[str, str]
    stacked: Mapping[str, tuple[str, ...]]
    sliced: Mapping[str, tuple[str, ...]]


def matched(
    where: str, saved: Mapping[str, Leaf], here: Mapping[str, Leaf], *, part: str | None = None, cast: bool = False
) -> Match:
    """Match every leaf of `here`, and unless a `part` is asked for, every one of `saved`.

    Args:
        where: The checkpoint, for messages.
        saved: What the checkpoint holds.
        here: What the reader wants.
        part: Match what lies below this path of the checkpoint, and leave be what `here` lacks.
        cast: Let floating-point dtypes differ.
    Raises:
        CheckpointError: Naming all leaves that are missing, too many, or of another shape or dtype.
    """
    names = _below(where, saved, part)
    theirs = {short: saved[name] for short, name in names.items()}
    found, lines = _pair(theirs, here, cast=cast, strict=part is None)
    if lines:
        way_out = (
            "Build the model, optimiser and containers as they were when it was saved, or choose another directory."
        )
        if not cast and not _pair(theirs, here, cast=True, strict=part is None)[1]:
            way_out = "Only floating-point dtypes differ: cast=True rounds what was saved to the dtypes here."
        differ = "1 leaf differs" if len(lines) == 1 else f"{len(lines)} leaves differ"
        raise CheckpointError(
            f"{where} is a checkpoint of another program: {differ} ({len(names)} in the checkpoint, {len(here)} "
            f"here).\n{listed(lines, MOST_LINES)}\n{way_out}"
        )
    return Match(
        same={mine: names[short] for mine, short in found.same.items()},
        stacked={mine: tuple(names[each] for each in layers) for mine, layers in found.stacked.items()},
        sliced={names[short]: layers for short, layers in found.sliced.items()},
    )


def pair(saved: Mapping[str, Leaf], here: Mapping[str, Leaf]) -> tuple[Match, list[str]]:
    """As `matched`, with a line for each leaf that differs rather than an error."""
    return _pair(saved, here, cast=False, strict=True)


def layer_dims(name: str, mine: tuple[int, ...], theirs: tuple[int, ...]) -> tuple[int, int] | None:
    """How many leading dims count the layers of the stack `name` in two shapes of it; `None` if these are no such two.

    Example:
        >>> from jaxpar.checkpoint._match import layer_dims
        >>> layer_dims("blocks.each.bias", (8, 5), (2, 4, 5)), layer_dims("blocks.each.bias", (8, 5), (8, 5))
        ((1, 2), None)
    """
    if EACH not in name.split(".") or mine == theirs:
        return None
    for a, b in ((1, 2), (2, 1), (2, 2)):
        if math.prod(mine[:a]) == math.prod(theirs[:b]) and mine[a:] == theirs[b:] and len(mine) - a == len(theirs) - b:
            return a, b
    return None


def layer_names(name: str) -> Iterator[Callable[[int], str]]:
    """Every way to name the layers of a stack called `name`."""
    segments = name.split(".")
    for at, segment in enumerate(segments):
        if segment == EACH:
            yield _spelling(segments[:at], "{}", segments[at + 1 :])
    for at in range(len(segments) + 1):
        yield _spelling(segments[:at], "{}", segments[at:])
    for at, segment in enumerate(segments):
        yield _spelling(segments[:at], segment.replace("{", "{{").replace("}", "}}") + "_{}", segments[at + 1 :])


def _spelling(before: list[str], middle: str, after: list[str]) -> Callable[[int], str]:
    return lambda index: ".".join([*before, middle.format(index), *after])


def _below(where: str, saved: Mapping[str, Leaf], part: str | None) -> dict[str, str]:
    """Paths in the checkpoint, by what they are called below `part`."""
    if not part:
        return {name: name for name in saved}
    names = {name.removeprefix(f"{part}."): name for name in saved if name.startswith(f"{part}.")}
    if part in saved:
        names["value"] = part  # a bare array, as the root of a tree is called
    if not names:
        tops = sorted({name.split(".")[0] for name in saved})
        inner = {".".join(name.split(".")[:depth]) for name in saved for depth in range(1, 5)}
        close = difflib.get_close_matches(part, inner, n=1)
        meant = f" Did you mean {close[0]!r}?" if close else ""
        raise CheckpointError(f"{where} has no part {part!r}.{meant} At its top it has {', '.join(tops[:20])}.")
    return names


def _pair(saved: Mapping[str, Leaf], here: Mapping[str, Leaf], *, cast: bool, strict: bool) -> tuple[Match, list[str]]:
    def fits(mine: Leaf, theirs: Leaf) -> bool:
        return mine.kind == theirs.kind or (cast and mine.is_floating and theirs.is_floating)

    missing = {name: here[name] for name in here if name not in saved}
    surplus = {name: saved[name] for name in saved if name not in here}
    same = {name: name for name in here if name in saved}
    stacked = _take_layers(missing, surplus, fits)
    sliced = _take_layers(surplus, missing, fits)
    _pair_shared(same, missing, surplus)

    lines = [
        f"{name}: {saved.get(same.get(name, name), 'missing')} in the checkpoint, {here[name]} here"
        for name in here
        if name in missing
        or (name in same and not (_alike(name, here[name], saved[same[name]]) and fits(here[name], saved[same[name]])))
    ]
    if strict:
        lines += [f"{name}: {leaf} in the checkpoint, nothing here" for name, leaf in surplus.items()]
    return Match(same=same, stacked=stacked, sliced=sliced), lines


def _take_layers(
    stacks: dict[str, Leaf], singles: dict[str, Leaf], fits: Callable[[Leaf, Leaf], bool]
) -> dict[str, tuple[str, ...]]:
    """The stacks whose layers are among `singles`, each with those; taken out of both."""
    found = {}
    for name in list(stacks):
        layers = _layers(name, stacks[name], singles, fits)
        if layers:
            found[name] = layers
            del stacks[name]
            for each in layers:
                del singles[each]
    return found


def _layers(
    name: str, stack: Leaf, others: Mapping[str, Leaf], fits: Callable[[Leaf, Leaf], bool]
) -> tuple[str, ...] | None:
    """The leaves of `others` that are the layers of `stack`."""
    if not stack.shape or not stack.shape[0]:
        return None
    for spelling in layer_names(name):
        if spelling(0) not in others:
            continue
        for dims in (1, 2) if EACH in name.split(".") else (1,):
            number, shape = math.prod(stack.shape[:dims]), stack.shape[dims:]
            names = tuple(map(spelling, range(number)))
            if spelling(number) not in others and all(
                each in others and others[each].shape == shape and fits(stack, others[each]) for each in names
            ):
                return names
    return None


def _alike(name: str, mine: Leaf, theirs: Leaf) -> bool:
    """Whether two leaves have one shape, or are one stack whose layers are counted by one dim here and two there."""
    if mine.shape is None or theirs.shape is None:
        return mine.shape == theirs.shape
    return mine.shape == theirs.shape or layer_dims(name, mine.shape, theirs.shape) is not None


def _pair_shared(same: dict[str, str], missing: dict[str, Leaf], surplus: dict[str, Leaf]) -> None:
    """A variable that all layers of a stack share is kept once: by the stack, or under the first layer's path."""
    for stacks, layers, is_here in ((missing, surplus, True), (surplus, missing, False)):
        for name in list(stacks):
            for spelling in layer_names(name) if EACH in name.split(".") else ():
                first = spelling(0)
                if first in layers and spelling(1) not in layers and layers[first] == stacks[name]:
                    same.update({name: first} if is_here else {first: name})
                    del stacks[name], layers[first]
                    break
