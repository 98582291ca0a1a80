"""A residual network learns handwritten digits over 8 simulated devices: `python -m models.resnet [--steps 120]`."""

import sys

import jaxpar as jp
from models import classify

from . import demo


def main(argv: list[str] | None = None) -> int:
    """0 if 19 of 20 unseen digits are right."""
    return classify.demo("resnet", demo(), jp.mesh("cpu:8", data=4, fsdp=2), goal=0.95, steps=120, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
