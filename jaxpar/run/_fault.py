"""What a watcher finds wrong with a run, and how far the run must go back for it."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One finding; every process comes to the same one.

    Attributes:
        kind: As in `jaxpar.run._events.KINDS`.
        step: Where it was seen.
        text: What happened and where, as the first half of a readable line.
        sound: The last step whose state can be trusted: the run goes back to a checkpoint at or before it.
        skip: Steps whose batches are left out from then on.
    """

    kind: str
    step: int
    text: str
    sound: int
    skip: tuple[int, ...] = ()
