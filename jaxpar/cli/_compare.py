"""`jaxpar compare`: from what was typed to a table of meshes.

The table alone goes to standard output; progress, and whatever a user's module prints, to standard error.
"""

import contextlib
import sys
from typing import TYPE_CHECKING

from .._errors import StepError
from . import _load

if TYPE_CHECKING:
    from ._commands import Compare


def run_compare(command: "Compare") -> int:
    """Print the comparison that `command` asks for; 130 if it was interrupted and is not whole, 1 if nothing fits."""
    from ..compare import compare

    with contextlib.redirect_stdout(sys.stderr):
        recipe = _load.recipe(command.recipe)
        found = compare(
            recipe,
            command.target,
            batch=command.batch,
            seq=command.seq,
            tokens=command.tokens,
            price=_price(command.price),
            compile=command.compile,
        )
    if command.html:
        command.html.write_text(found.to_html(), encoding="utf-8")
    print(found.to_json() if command.json else found)
    if found.interrupted:
        return 130
    return 0 if found.candidates else 1


def _price(said: str | None) -> float | dict[str, float] | None:
    """One number, or one for each target: `4.2`, `v5e=1.2,v5p=4.2`."""
    if said is None:
        return None
    try:
        if "=" not in said:
            return float(said)
        pairs = (pair.partition("=") for pair in said.split(","))
        return {name.strip(): float(price) for name, _, price in pairs}
    except ValueError:
        raise StepError(
            f"--price {said!r} is not the price of a chip for an hour. Write 4.2, or one for each target, "
            "v5e=1.2,v5p=4.2."
        ) from None
