"""A mixture of experts learns Python from the standard library's sources, over 8 simulated devices.

    python -m models.moe [--steps 200] [--directory runs/moe]

Experts over 4 devices, their tokens by all-to-all. It ends with a validation loss, beside the entropies that tables of
bytes and of byte pairs reach at best on the same text, and with the share of choices that found no room.
"""

import argparse
import pathlib
import sys

import jaxpar as jp
from models import data

from . import demo


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate, and say how it went: 0 if the model is better than a table of byte frequencies."""
    parser = argparse.ArgumentParser(prog="python -m models.moe", description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("runs/moe"))
    args = parser.parse_args(argv)

    jp.compilation_cache(".cache/jaxpar/compiled")
    recipe = demo()
    program = recipe.on(jp.mesh("cpu:8", data=2, expert=4))
    print(program)
    train, validation = data.text()
    rows, seq = recipe.batch["tokens"].shape
    fitted = jp.fit(
        program,
        jp.data.Loader(train, batch_size=rows, seq_len=seq),
        steps=args.steps,
        directory=args.directory,
        name="models.moe:demo",
    )
    unseen = jp.data.Loader(validation, batch_size=rows, seq_len=seq)
    said = [program.eval_step(fitted.state, program.plan.batch(unseen.batch(index))) for index in range(8)]
    found = {name: sum(float(each[name]) for each in said) / len(said) for name in said[0]}
    frequencies, loss = jp.data.unigram_entropy(validation), found["cross_entropy"]
    print(f"""
validation, nats per byte
  {frequencies:.3f}  byte frequencies, at best
  {jp.data.bigram_entropy(validation):.3f}  byte pairs, at best
  {loss:.3f}  this model after {fitted.steps} steps{"" if loss < frequencies else ": not there yet"}
experts: balance {found["balance"]:.2f} (1 is even), {found["overflow"]:.1%} of choices found no room""")
    return int(loss >= frequencies)


if __name__ == "__main__":
    sys.exit(main())
