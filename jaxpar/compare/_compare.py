"""`compare`: every legal mesh by estimate, the best few by the compiler, one table."""

import dataclasses
import itertools
import logging
import os
from collections.abc import Mapping, Sequence

from .. import _hardware, _mesh_spec
from .._errors import MeshError, ShardingError, StepError
from .._hardware import Hardware
from .._plan_text import bytes_text
from .._recipe import Recipe
from ..explain import Report
from ..explain._estimate import num_tokens
from . import _scale
from ._candidates import Candidate, Rejected, Search, refused
from ._comparison import Comparison
from ._rank import TIE, ranked

logger = logging.getLogger("jaxpar")

TOKENS_PER_PARAMETER = 20
"""How long a training is reckoned where nobody says: Hoffmann et al., 2022 (arXiv:2203.15556), table 3."""


def compare(
    recipe: Recipe,
    target: str | Hardware | Sequence[str | Hardware],
    *,
    batch: int | str | None = None,
    seq: int | None = None,
    tokens: int | str | None = None,
    price: float | Mapping[str, float] | None = None,
    compile: int = 4,  # noqa: A002  # what it says on the command line too
) -> Comparison:
    """Which mesh a recipe trains fastest on, and why not the others.

    Every way to share the target's devices among the axes of the recipe's strategies is estimated without compiling
    (after one trace, milliseconds each), and the best few of each target are compiled, for hardware that is here or
    not. Meshes whose times are too close to tell apart are ranked by simplicity: fewer axes first. A step that does not
    fit is split into more microbatches. Ctrl-C keeps what is done. Progress goes to the log `jaxpar`.

    Args:
        recipe: What to train.
        target: Hardware by name, `"v5p-128"`; several as a list, or in one text, `"v5p-64,v5p-128"`.
        batch: The global batch, in rows, `1024`, or in tokens, `"4M-tokens"`; the recipe's own if not given.
        seq: Tokens of a sequence, if not the recipe's.
        tokens: To train on (rows, without a sequence), `"1T"`: for the days and the price. If not given, 20 for each
            parameter of a model of sequences.
        price: Of one chip for an hour, in any currency; or for each target its own.
        compile: How many meshes of each target to compile; 0 for none.

    Raises:
        MeshError: The target is not known or nobody says how fast it is; or a strategy is on an axis that `jp.mesh`
            lacks; or no mesh has a plan. If none fits, that is a comparison, with the reasons.
        StepError: The batch cannot be made as asked, or the model refuses it.

    Example:
        >>> from models.mlp import mlp
        >>> found = jp.compare(mlp(), "v5e:2x4", batch=4096, compile=0)
        >>> found.best.axes
        {'data': 8}
    """
    if compile < 0:
        raise StepError(f"compare: compile={compile}. Give how many meshes to compile, or 0 for none.")
    if os.environ.get(_mesh_spec.VARIABLE, "").strip():
        raise MeshError(f"compare tries one mesh after another, and {_mesh_spec.VARIABLE} replaces them all. Unset it.")
    hardware = _targets(target)
    recipe = _scale.scaled(recipe, batch, seq)
    search = Search(recipe)
    candidates: list[Candidate] = []
    rejected: list[Rejected] = []
    notes: list[str] = []
    interrupted = False
    try:
        for each in hardware:
            meshes = search.meshes(each)
            for at, axes in enumerate(meshes, 1):
                found = search.look(each, axes)
                (candidates if isinstance(found, Candidate) else rejected).append(found)  # pyright: ignore[reportArgumentType]
                logger.debug("%s: estimated %d of %d", each.name, at, len(meshes))
            logger.info("%s: %d meshes estimated", each.name, len(meshes))
        candidates = ranked(candidates)
        for each in hardware:
            _compile_best(search, each, compile, candidates, rejected, notes)
    except KeyboardInterrupt:
        interrupted = True
        compiled = sum(each.is_compiled for each in candidates)
        notes.append(
            f"interrupted: {len(candidates) + len(rejected)} meshes were estimated and {compiled} compiled by then"
        )
        if not candidates:
            raise
    candidates = ranked(candidates)
    plan = search.plan
    if plan is None:
        reasons = "\n".join(f"  {each.target} {each.axes}: {each.detail or each.reason}" for each in rejected[:4])
        raise MeshError(f"compare: no mesh of {', '.join(each.name for each in hardware)} has a plan:\n{reasons}")
    if any(a.seconds > b.seconds for a, b in itertools.pairwise(candidates) if a.target == b.target):
        notes.append(
            f"times within {TIE['estimate']:.0%} of each other (compiled ones {TIE['compiled']:.0%}) count as equal: "
            "the simpler mesh comes first"
        )
    length = _scale.sequence_length(recipe)
    notes += filter(None, (_calibration([each for each in candidates if each.target == at.name]) for at in hardware))
    if tokens is None and length is not None:
        notes.append(f"days and cost are for {TOKENS_PER_PARAMETER} tokens a parameter (tokens= for others)")
    return Comparison(
        name=type(plan.birth.build(plan.birth.shapes)).__name__,
        targets=tuple(each.name for each in hardware),
        rows=recipe.batch_size,
        seq=length,
        num_tokens=num_tokens(recipe),
        num_parameters=plan.totals().num_parameters,
        train_tokens=_scale.number(tokens)
        if tokens is not None
        else 0
        if length is None
        else TOKENS_PER_PARAMETER * plan.totals().num_parameters,
        price=_prices(price, hardware),
        candidates=tuple(candidates),
        rejected=tuple(rejected),
        notes=tuple(notes),
        interrupted=interrupted,
    )


def _compile_best(
    search: Search,
    hardware: Hardware,
    count: int,
    candidates: list[Candidate],
    rejected: list[Rejected],
    notes: list[str],
) -> None:
    """Compile the best `count` candidates of `hardware`, and put what the compiler says in their place.

    Where the compiler needs more memory than was estimated, and finds no room, the others of the same hardware are
    expected to need as much more, and are fitted anew, into more microbatches.
    """
    if not count:
        return
    from ..explain import explain

    done = 0
    for _ in range(3 * count):
        left = [each for each in ranked(candidates) if each.target == hardware.name and not each.is_compiled]
        if done == count or not left:
            return
        candidate = left[0]
        logger.info("%s: compiling %s", hardware.name, candidate.name)
        at = candidates.index(candidate)
        try:
            report = explain(search.programs[hardware.name, tuple(candidate.axes.items())])
        except (ShardingError, StepError) as error:
            del candidates[at]
            rejected.append(refused(hardware.name, candidate.axes, str(error)))
            continue
        if report.origin == "compiled":
            candidates[at] = dataclasses.replace(candidate, report=report)
            done += 1
        elif report.origin == "refused":
            notes.append(_fit_again(search, hardware, candidate, report, candidates, rejected))
        else:
            notes.append(f"{hardware.name}: nothing was compiled: {'; '.join(report.notes[:1])}")
            return


def _fit_again(
    search: Search,
    hardware: Hardware,
    candidate: Candidate,
    report: Report,
    candidates: list[Candidate],
    rejected: list[Rejected],
) -> str:
    """Fit what is not compiled yet with the margin that `candidate` turned out to need; a note of it."""
    needed, reckoned = report.memory, candidate.estimate.memory
    assert needed is not None, "a refusal says what it needs"
    assert reckoned is not None, "an estimate has its memory"
    search.margin = max(search.margin, needed.peak / reckoned.peak)
    for each in [each for each in candidates if each.target == hardware.name and not each.is_compiled]:
        candidates.remove(each)
        found = search.look(hardware, each.axes)
        if isinstance(found, Candidate):
            candidates.append(found)
        else:
            rejected.append(found)
    return (
        f"{hardware.name}: the compiler needs {bytes_text(needed.peak)} for {candidate.name}, {search.margin - 1:.0%} "
        "more than estimated, so the others were fitted with that margin"
    )


def _calibration(here: Sequence[Candidate]) -> str:
    """How far the estimates of one target are from the compiler, where the table has both."""
    errors = [
        each.seconds / each.estimate.timeline.step_seconds - 1
        for each in here
        if each.is_compiled and each.estimate.timeline is not None
    ]
    if not errors or len(errors) == len(here):
        return ""
    least, most = min(errors), max(errors)
    told = f"{least:+.0%}" if f"{least:.0%}" == f"{most:.0%}" else f"{least:+.0%} to {most:+.0%}"
    return (
        f"{here[0].target}: compiled steps take {told} against their own estimates; meshes that were only estimated "
        "come after them, and their times are to be read with that"
    )


def _targets(target: str | Hardware | Sequence[str | Hardware]) -> list[Hardware]:
    given = [target] if isinstance(target, str | Hardware) else list(target)
    names = [part for each in given for part in (each.split(",") if isinstance(each, str) else [each])]
    found = [_hardware.parse(each.strip()) if isinstance(each, str) else each for each in names if each]
    if not found:
        raise MeshError('compare: no target was named. Name hardware, target="v5p-128", or several.')
    slow = [each.name for each in found if not each.peak_flops()]
    if slow:
        raise MeshError(
            f"compare: nobody says how fast {slow[0]} is, so its meshes cannot be ranked. Name hardware that has a "
            'published speed, target="v5p-128".'
        )
    return found


def _prices(price: float | Mapping[str, float] | None, hardware: list[Hardware]) -> dict[str, float]:
    if price is None:
        return {}
    if not isinstance(price, Mapping):
        return {each.name: float(price) for each in hardware}
    found = {}
    for each in hardware:
        for name in (each.name, each.spec, each.chip.name):
            if name in price:
                found[each.name] = float(price[name])
                break
    unknown = set(price) - {name for each in hardware for name in (each.name, each.spec, each.chip.name)}
    if unknown:
        raise MeshError(
            f"compare: a price for {sorted(unknown)[0]!r}, which is no target. Targets: "
            f"{', '.join(each.name for each in hardware)}."
        )
    return found
