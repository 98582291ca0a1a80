"""The schedules of the literature, in ticks.

    gpipe    all forwards, then all backwards (Huang et al., 2019, arXiv:1811.06965); with chunks this is the circular
             or breadth-first schedule (Lamy-Poirier, 2022, arXiv:2211.05953)
    1f1b     a backward as soon as it can be, so that memory does not grow with the microbatches (PipeDream-flush); with
             chunks the interleaved schedule (Narayanan et al., 2021, arXiv:2104.04473)
    zb-h1    1f1b with weight gradients apart, in what would be bubbles (Qi et al., 2024, arXiv:2401.10241)

All are one rule. Work is put in a line: the place of an item, `first[item]`, is the tick in which stage 0 runs its
forward, and stage i runs it i ticks later. The backwards are a line of their own that starts at the last stage.

1F1B of separate programs holds p microbatches on stage 0. Here all stages go in step, one F and one B a tick, and what
stage 0 sends comes back 2(p-1) ticks later: it holds 2p-1, in the same time. With two chunks or more the two hold the
same but for one.
"""

from .._errors import ShardingError, nearest
from ._table import KINDS, Cell, Op, Table

NAMED = ("gpipe", "1f1b", "zb-h1")
"""The names."""

_ALSO = {
    "interleaved": "'1f1b' with chunks=2 or more",
    "interleaved-1f1b": "'1f1b' with chunks=2 or more",
    "circular": "'gpipe' with chunks=2 or more",
    "breadth-first": "'gpipe' with chunks=2 or more",
    "looped-bfs": "'gpipe' with chunks=2 or more",
    "zero-bubble": "'zb-h1'",
}


def named(name: str, *, stages: int, microbatches: int, chunks: int) -> Table:
    """The table of the schedule called `name`.

    Raises:
        ShardingError: An unknown name; a number below 1; chunks where the schedule has none.
    """
    if name not in NAMED:
        other = f" {name!r} is {_ALSO[name]}." if name in _ALSO else nearest(name, NAMED)
        raise ShardingError(
            f"schedule: there is none called {name!r}.{other} They are: {', '.join(NAMED)}. Your own: "
            "jp.Schedule.load('mine.csv')."
        )
    for what, number in (("stages", stages), ("microbatches", microbatches), ("chunks", chunks)):
        if number < 1:
            raise ShardingError(f"schedule {name!r}: {what} is {number}. Use 1 or more.")
    if name == "zb-h1":
        if chunks > 1:
            raise ShardingError(
                f"schedule 'zb-h1': chunks is {chunks}, but it has one chunk a stage. Use chunks=1, or '1f1b'."
            )
        return _zero_bubble(stages, microbatches)
    return (_gpipe if name == "gpipe" else _one_f_one_b)(stages, microbatches, chunks)


Line = dict[tuple[int, int], int]
"""The place of each `(microbatch, chunk)` in the line of work."""


def _gpipe(p: int, m: int, v: int) -> Table:
    period = max(m, p)  # a chunk's first result is back at stage 0 after p ticks
    first = {(j, c): c * period + j for c in range(v) for j in range(m)}
    span = (v - 1) * period + m
    # Autodiff's order: what was computed last goes back first.
    backward = {item: (span + p - 1) + (span - 1 - place) for item, place in first.items()}
    return _table(p, first, backward, {})


def _one_f_one_b(p: int, m: int, v: int) -> Table:
    """Groups of p microbatches or a few more, each through all chunks in turn; without chunks, one after another."""
    first: Line = {}
    last: Line = {}
    place = 0
    sizes = _groups(m, max(m // p, 1)) if v > 1 else [m]
    start = 0
    for size in sizes:
        period = max(size, p) if v > 1 else size
        for c in range(v):
            for j in range(size):
                first[start + j, c] = place + c * period + j
                last[start + j, c] = place + (v - 1 - c) * period + j
        place += (v - 1) * period + size
        start += size
    # The last stage runs the backward of an item in the tick of its forward.
    delay = (v - 1) * max(*sizes, p) + p - 1 if v > 1 else p - 1
    return _table(p, first, {item: place + delay for item, place in last.items()}, {})


def most_held(p: int, v: int) -> int:
    """The inputs that stage 0 of 1F1B holds at once, of any number of microbatches that is a multiple of p."""
    return 2 * p - 1 if v == 1 else (v + 1) * p - 1


def _zero_bubble(p: int, m: int) -> Table:
    """A stage puts off its weight gradients by as many microbatches as its backwards are ahead of stage 0's."""
    first = {(j, 0): j for j in range(m)}
    backward = {(j, 0): j + p - 1 for j in range(m)}
    return _table(p, first, backward, {(j, 0): j + 2 * (p - 1) for j in range(m)})


def _groups(m: int, number: int) -> list[int]:
    """`m` in `number` groups as equal as can be, the larger ones first."""
    return [m // number + (place < m % number) for place in range(number)]


def _table(p: int, first: Line, backward: Line, weight: Line) -> Table:
    """Forwards go down the stages, backwards up, each a tick a stage; weight gradients run on all at once."""
    placed: dict[tuple[int, int], list[Op]] = {}
    for stage in range(p):
        lines = ((first, stage), (backward, p - 1 - stage), (weight, 0))
        for kind, (line, shift) in zip(KINDS, lines, strict=True):
            for (microbatch, chunk), place in line.items():
                placed.setdefault((place + shift, stage), []).append(Op(kind, microbatch, chunk))
    ticks = 1 + max(tick for tick, _ in placed)

    def cell(tick: int, stage: int) -> Cell:
        return tuple(sorted(placed.get((tick, stage), ()), key=lambda op: KINDS.index(op.kind)))

    return Table(tuple(tuple(cell(tick, stage) for stage in range(p)) for tick in range(ticks)))


def in_order(orders: list[list[Op]]) -> Table:
    """The table in which each stage runs its ops in the given order, one a tick, each as early as it can.

    Raises:
        ShardingError: Stages wait for one another for ever; says for what.
    """
    # A table of one tick, for the neighbours of each chunk.
    ring = Table((tuple(tuple(order) for order in orders),))
    done: dict[tuple[int, Op], int] = {}
    at = [0] * len(orders)
    rows: list[tuple[Cell, ...]] = []
    while True:
        waiting = {stage: ops[at[stage]] for stage, ops in enumerate(orders) if at[stage] < len(ops)}
        if not waiting:
            return Table(tuple(rows))
        missing = {stage: [need for need in ring.needs(stage, op) if need not in done] for stage, op in waiting.items()}
        if all(missing.values()):
            stuck = [
                f"stage {stage} waits with {op} for "
                + " and ".join(f"{need} of stage {where}" for where, need in missing[stage])
                for stage, op in waiting.items()
            ]
            raise ShardingError(f"schedule: these orders never end: {'; '.join(stuck)}. Change one of these orders.")
        ready = {stage: op for stage, op in waiting.items() if not missing[stage]}
        rows.append(tuple((ready[stage],) if stage in ready else () for stage in range(len(orders))))
        for stage, op in ready.items():
            done[stage, op] = len(rows) - 1
            at[stage] += 1
