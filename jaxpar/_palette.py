"""One colour for each mesh axis, in every figure and table.

The hues are those of Okabe and Ito (2008), told apart with any colour vision, the yellow darkened so that it shows on
white. They mark axes and nothing else; text is never coloured, so that it reads in light and dark.
"""

import re
import zlib
from collections.abc import Iterable

_HUES = ("#0072b2", "#e69f00", "#009e73", "#56b4e9", "#d55e00", "#cc79a7", "#b8a800", "#7f7f7f")
_USUAL = {axis: _HUES[place] for place, axis in enumerate(("data", "fsdp", "tensor", "context", "expert", "pipe"))}
_DARK = {"#0072b2", "#009e73", "#d55e00", "#7f7f7f"}


def hues(axes: Iterable[str]) -> dict[str, str]:
    """A hue for each of a mesh's axes: always the same for the usual ones, chosen by their names for others.

    Example:
        >>> from jaxpar._palette import hues
        >>> hues(["data", "tensor"]) == hues(["tensor", "data"])
        True
    """
    axes = list(axes)
    found = {axis: _USUAL[axis] for axis in axes if axis in _USUAL}
    for axis in sorted(set(axes) - set(found)):
        start = zlib.crc32(axis.encode())
        wheel = [_HUES[(start + step) % len(_HUES)] for step in range(len(_HUES))]
        found[axis] = next((hue for hue in wheel if hue not in found.values()), wheel[0])
    return found


def on(hue: str) -> str:
    """Black or white, whichever reads on `hue`."""
    return "#ffffff" if hue in _DARK else "#000000"


def marked(text: str, axes: Iterable[str]) -> str:
    """HTML `text` with every word that is an axis underlined in its hue."""
    found = hues(axes)
    if not found:
        return text
    words = "|".join(map(re.escape, sorted(found, key=len, reverse=True)))
    return re.sub(
        rf"(?<![\w.-])({words})(?![\w.-])",
        lambda match: f'<span style="border-bottom:3px solid {found[match[1]]}">{match[1]}</span>',
        text,
    )
