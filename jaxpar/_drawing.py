"""A picture: its text, and its shapes; shown in a notebook, or saved as a file.

It is text, SVG and HTML by itself, and PNG where matplotlib is.
"""

import dataclasses
import html
import importlib.util
import os
import pathlib
from typing import Any

from . import _draw_scene as scenes
from ._draw_scene import Scene
from ._errors import ShardingError


@dataclasses.dataclass(frozen=True, eq=False)
class Drawing:
    """A picture. The last line of a notebook cell shows it; `print` shows its text.

    Attributes:
        text: The picture in characters.
        scene: The picture in shapes.
        title: Of a page of its own.
    """

    text: str
    scene: Scene
    title: str = "A plan"

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return self.text

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        # Either PNG or HTML: where there are both, notebooks and code hosts prefer HTML, and hosts strip the SVG in it.
        if importlib.util.find_spec("matplotlib") is None:
            return {"text/plain": self.text, "text/html": scenes.svg(self.scene, alone=False)}, {}
        size = {"width": round(self.scene.width), "height": round(self.scene.height)}
        return {"text/plain": self.text, "image/png": scenes.png(self.scene)}, {"image/png": size}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture to `path`, as its ending says: `.svg` and `.html` by itself, `.png` by matplotlib.

        Raises:
            ShardingError: Another ending.
            ModuleNotFoundError: A PNG, and matplotlib is not installed.
        """
        path = pathlib.Path(path)
        if path.suffix == ".png":
            path.write_bytes(scenes.png(self.scene))
        elif path.suffix == ".svg":
            path.write_text(scenes.svg(self.scene, alone=True), encoding="utf-8")
        elif path.suffix == ".html":
            path.write_text(_page(self.scene, self.title), encoding="utf-8")
        else:
            raise ShardingError(
                f"{path}: a picture is written as .png, .svg or .html, not {path.suffix or 'without'!r}."
            )


def _page(scene: Scene, title: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title></head>\n<body>{scenes.svg(scene, alone=False)}</body></html>\n"
    )
