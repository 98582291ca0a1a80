"""A mixture of experts learns Python from the standard library's sources, over 8 simulated devices.

    python -m models.moe [--steps 200] [--directory runs/moe]

Experts over 4 devices, their tokens by all-to-all. It ends with a validation loss, beside the entropies that tables of
bytes and of byte pairs reach at best on the same text, and with the share of choices that found no room.
"""

import sys

import jaxpar as jp
from models.language import learn

from . import demo


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate, and say how it went: 0 if the model is better than a table of byte frequencies."""
    learnt = learn("moe", demo(), jp.mesh("cpu:8", data=2, expert=4), steps=200, about=__doc__, argv=argv)
    found = {name: sum(float(each[name]) for each in learnt.said) / len(learnt.said) for name in learnt.said[0]}
    frequencies, loss = jp.data.unigram_entropy(learnt.unseen), found["cross_entropy"]
    print(f"""
validation, nats per byte
  {frequencies:.3f}  byte frequencies, at best
  {jp.data.bigram_entropy(learnt.unseen):.3f}  byte pairs, at best
  {loss:.3f}  this model after {learnt.steps} steps{"" if loss < frequencies else ": not there yet"}
experts: balance {found["balance"]:.2f} (1 is even), {found["overflow"]:.1%} of choices found no room""")
    return int(loss >= frequencies)


if __name__ == "__main__":
    sys.exit(main())
