"""A Vision Transformer learns handwritten digits over 8 simulated devices: `python -m models.vit [--steps 240]`."""

import sys

import jaxpar as jp
from models import classify

from . import demo


def main(argv: list[str] | None = None) -> int:
    """0 if nine of ten unseen digits are right."""
    mesh = jp.mesh("cpu:8", data=2, fsdp=2, tensor=2)
    return classify.demo("vit", demo(), mesh, goal=0.9, steps=240, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
