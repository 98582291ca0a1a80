"""Shapes on a plane, and two ways to paint them: SVG by hand, which needs nothing, and PNG by matplotlib.

Units are pixels, y goes down, and text is placed by its baseline. `INK` is the colour of the text around a drawing, so
that an SVG suits a light page and a dark one; a PNG brings its own white paper. Behind nothing is there paper: shapes
that overlap are given as the parts of them that show.
"""

import dataclasses
import html
import io
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

INK = "currentColor"
_PRINTED_INK = "#1f2328"
_FONT = "'DejaVu Sans', Verdana, sans-serif"

_MOST_DOTS = 3_000_000
"""In a PNG, which then stays well under 200 kB as text in a notebook."""

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Area:
    """A filled polygon."""

    points: tuple[Point, ...]
    fill: str = INK
    opacity: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A line through points."""

    points: tuple[Point, ...]
    color: str = INK
    width: float = 1.0
    opacity: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """One line of text at a point on its baseline; `turned` reads upwards."""

    at: Point
    text: str
    size: float = 11
    anchor: Literal["start", "middle", "end"] = "start"
    bold: bool = False
    color: str = INK
    opacity: float = 1.0
    turned: bool = False


Shape = Area | Line | Label


@dataclasses.dataclass(frozen=True)
class Scene:
    """Shapes, and the room they take from (0, 0)."""

    width: float
    height: float
    shapes: tuple[Shape, ...] = ()

    def at(self, x: float, y: float) -> tuple[Shape, ...]:
        """The shapes, moved by (x, y)."""
        return tuple(_moved(shape, x, y) for shape in self.shapes)


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """About how wide `text` is, rather too much than too little."""
    return len(text) * size * (0.7 if bold else 0.62)


def box(x: float, y: float, width: float, height: float, *, fill: str = INK, opacity: float = 1.0) -> Area:
    """A rectangle."""
    corners = ((x, y), (x + width, y), (x + width, y + height), (x, y + height))
    return Area(points=corners, fill=fill, opacity=opacity)


def words(text: str, *, size: float = 11, bold: bool = False, opacity: float = 1.0) -> Scene:
    """One line of text as a scene."""
    label = Label(at=(0, size * 1.05), text=text, size=size, bold=bold, opacity=opacity)
    return Scene(text_width(text, size, bold=bold), size * 1.4, (label,))


def beside(scenes: Sequence[Scene], gap: float) -> Scene:
    """Scenes from left to right."""
    height = max((scene.height for scene in scenes), default=0)
    shapes: list[Shape] = []
    x = 0.0
    for scene in scenes:
        shapes += scene.at(x, 0)
        x += scene.width + gap
    return Scene(max(x - gap, 0), height, tuple(shapes))


def above(scenes: Sequence[Scene], gap: float) -> Scene:
    """Scenes from top to bottom."""
    shapes: list[Shape] = []
    y = 0.0
    for scene in scenes:
        shapes += scene.at(0, y)
        y += scene.height + gap
    return Scene(max((scene.width for scene in scenes), default=0), max(y - gap, 0), tuple(shapes))


def framed(scene: Scene, margin: float) -> Scene:
    """A scene with room around it."""
    return Scene(scene.width + 2 * margin, scene.height + 2 * margin, scene.at(margin, margin))


def svg(scene: Scene, *, alone: bool) -> str:
    """The scene as SVG; `alone` for a file of its own, which brings paper and ink for light and for dark."""
    width, height = f"{scene.width:.0f}", f"{scene.height:.0f}"
    fit = "" if alone else ' style="max-width:100%;height:auto"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="{_FONT}"{fit}>'
    )
    paper = (
        f"<style>svg{{color:{_PRINTED_INK}}}.paper{{fill:#fff}}@media(prefers-color-scheme:dark)"
        '{svg{color:#e6edf3}.paper{fill:#0d1117}}</style><rect class="paper" width="100%" height="100%"/>'
    )
    return "\n".join([head, *([paper] if alone else []), *map(_svg_shape, scene.shapes), "</svg>"])


def png(scene: Scene) -> bytes:
    """The scene as PNG on white paper, by matplotlib: two dots a pixel, less for a large one.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; says what to type.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a PNG is painted by matplotlib, which is not installed: pip install 'jaxpar[notebook]'. Or save the "
            "picture as .svg or .html, which need nothing."
        ) from error
    scale = min(2.0, math.sqrt(_MOST_DOTS / max(scene.width * scene.height, 1)))
    figure = Figure(figsize=(scene.width / 100, scene.height / 100), dpi=100 * scale, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, scene.width), ylim=(scene.height, 0))
    axes.set_axis_off()
    for order, shape in enumerate(scene.shapes):
        _paint(axes, shape, order)
    canvas.draw()
    file = io.BytesIO()
    # A hundred and twenty-eight colours are enough for flat ones with soft edges, and make a third of the bytes.
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(128, dither=Image.Dither.NONE).save(file, format="png", optimize=True)
    return file.getvalue()


def _moved(shape: Shape, x: float, y: float) -> Shape:
    if isinstance(shape, Label):
        return dataclasses.replace(shape, at=(shape.at[0] + x, shape.at[1] + y))
    return dataclasses.replace(shape, points=tuple((px + x, py + y) for px, py in shape.points))


def _svg_shape(shape: Shape) -> str:
    fade = f' opacity="{shape.opacity:g}"' if shape.opacity < 1 else ""
    if isinstance(shape, Label):
        x, y = shape.at
        turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if shape.turned else ""
        weight = ' font-weight="bold"' if shape.bold else ""
        return (
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{shape.size:g}" text-anchor="{shape.anchor}" '
            f'fill="{shape.color}"{weight}{turned}{fade}>{html.escape(shape.text)}</text>'
        )
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
    if isinstance(shape, Line):
        return f'<polyline points="{points}" fill="none" stroke="{shape.color}" stroke-width="{shape.width:g}"{fade}/>'
    return f'<polygon points="{points}" fill="{shape.fill}"{fade}/>'


def _paint(axes: Any, shape: Shape, order: int) -> None:
    def printed(color: str) -> str:
        return _PRINTED_INK if color == INK else color

    unit = 0.72  # points in a pixel: the figure has 100 pixels an inch
    if isinstance(shape, Label):
        axes.text(
            *shape.at,
            shape.text,
            fontsize=shape.size * unit,
            fontfamily="DejaVu Sans",
            fontweight="bold" if shape.bold else "normal",
            color=printed(shape.color),
            alpha=shape.opacity,
            ha={"start": "left", "middle": "center", "end": "right"}[shape.anchor],
            va="baseline",
            rotation=90 if shape.turned else 0,
            rotation_mode="anchor",
            parse_math=False,
            zorder=order,
        )
        return
    if isinstance(shape, Line):
        axes.plot(
            *zip(*shape.points, strict=True),
            color=printed(shape.color),
            linewidth=shape.width * unit,
            alpha=shape.opacity,
            solid_capstyle="butt",
            zorder=order,
        )
        return
    axes.fill(
        *zip(*shape.points, strict=True), facecolor=printed(shape.fill), alpha=shape.opacity, linewidth=0, zorder=order
    )
