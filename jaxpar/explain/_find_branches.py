"""Collectives in branches that not every device takes."""

from collections.abc import Iterator

from .._branches import stuck
from ._evidence import Evidence
from ._finding import Finding


def collectives_in_branches(seen: Evidence) -> Iterator[Finding]:
    """Collectives that some devices may never reach: the others then wait for ever."""
    transfers = {(each.op.computation, each.op.name): each for each in seen.transfers}
    for each in stuck(seen.module, seen.mesh, seen.varying):
        yield Finding(
            kind="permute-in-branch" if each.is_permute else "collective-in-branch",
            severity="error",
            reason=each.reason,
            place=seen.place(transfers[each.collective.computation, each.collective.name]),
            remedy=each.remedy,
        )
