"""BERT learns to guess masked bytes of the standard library's sources, over 8 simulated devices.

    python -m models.bert [--steps 240] [--directory runs/bert]

It ends with the loss of its guesses on unseen files, beside the entropy that a table of byte frequencies has at best.
"""

import sys

import jaxpar as jp
from models.language import learn

from . import demo


def main(argv: list[str] | None = None) -> int:
    """0 if the guesses are better than a table of byte frequencies."""
    learnt = learn("bert", demo(), jp.mesh("cpu:8", data=2, fsdp=2, tensor=2), steps=240, about=__doc__, argv=argv)
    weights = [float(each["weight"]) for each in learnt.said]
    loss = sum(float(each["loss"]) * weight for each, weight in zip(learnt.said, weights, strict=True)) / sum(weights)
    frequencies = jp.data.unigram_entropy(learnt.unseen)
    print(f"""
validation, nats per masked byte
  {frequencies:.3f}  byte frequencies, at best
  {loss:.3f}  this model after {learnt.steps} steps{"" if loss < frequencies else ": not there yet"}""")
    return int(loss >= frequencies)


if __name__ == "__main__":
    sys.exit(main())
