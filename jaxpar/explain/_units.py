"""Seconds, FLOPs, counts and shares for people, and text in columns."""

import math
from collections.abc import Collection, Sequence

from .._plan_text import bytes_text


def seconds_text(seconds: float | None) -> str:
    """A duration: `1.25 s`, `12.5 ms`, `3.1 µs`; `?` where it is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    if seconds == 0:
        return "0"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= 0.9995 * size:
            return f"{_three(seconds / size)} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def size_text(size: float) -> str:
    """Bytes, which may be fewer than none: `-12.0 MiB`."""
    return f"-{bytes_text(-size)}" if size < 0 else bytes_text(size)


def flops_text(flops: float | None) -> str:
    """FLOPs: `312 TFLOP`."""
    if flops is None or not math.isfinite(flops):
        return "?"
    for prefix, size in (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if flops >= 0.9995 * size:
            return f"{_three(flops / size)} {prefix}FLOP"
    return f"{flops:.0f} FLOP"


def number_text(number: float | None) -> str:
    """A count or a figure: `1,024`, `0.523`; `?` where it is not known."""
    if number is None or not math.isfinite(number):
        return "?"
    return f"{number:,.0f}" if isinstance(number, int) or abs(number) >= 100 else f"{number:.3g}"


def share_text(part: float, whole: float) -> str:
    """A percentage: `12 %`, `0.4 %`; `-` of nothing."""
    if not whole or not math.isfinite(part / whole):
        return "-"
    percent = 100 * part / whole
    return f"{percent:.0f} %" if abs(percent) >= 9.95 else f"{percent:.1f} %"


def shortened(text: str, most: int) -> str:
    """`text` in at most `most` characters, its middle left out."""
    if len(text) <= most:
        return text
    left = (most - 1) * 2 // 5
    return f"{text[:left]}…{text[len(text) - (most - 1 - left) :]}"


def bar(fraction: float, width: int) -> str:
    """A bar of characters, in eighths of one."""
    eighths = round(max(0.0, min(fraction, 1.0)) * width * 8) if math.isfinite(fraction) else 0
    if fraction > 0:
        eighths = max(eighths, 1)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def columns(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """Rows as lines with aligned columns, those of `right` to the right; empty columns are left out."""
    kept = [index for index in range(len(rows[0])) if any(row[index] for row in rows)]
    widths = {index: max(len(row[index]) for row in rows) for index in kept}
    pad = lambda index, cell: cell.rjust(widths[index]) if index in right else cell.ljust(widths[index])
    return ["  ".join(pad(index, row[index]) for index in kept).rstrip() for row in rows]


def _three(number: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{number:.0f}" if abs(number) >= 99.95 else f"{number:.1f}" if abs(number) >= 9.995 else f"{number:.2f}"
