"""BERT learns to guess masked bytes of the standard library's sources, over 8 simulated devices.

    python -m models.bert [--steps 240] [--directory runs/bert]

It ends with the loss of its guesses on unseen files, beside the entropy that a table of byte frequencies has at best.
"""

import argparse
import pathlib
import sys

import jaxpar as jp
from models import data

from . import demo


def main(argv: list[str] | None = None) -> int:
    """0 if the guesses are better than a table of byte frequencies."""
    parser = argparse.ArgumentParser(prog="python -m models.bert", description=__doc__)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("runs/bert"))
    args = parser.parse_args(argv)

    jp.compilation_cache(".cache/jaxpar/compiled")
    recipe = demo()
    program = recipe.on(jp.mesh("cpu:8", data=2, fsdp=2, tensor=2))
    print(program)
    train, validation = data.text()
    rows, seq = recipe.batch["tokens"].shape
    fitted = jp.fit(
        program,
        jp.data.Loader(train, batch_size=rows, seq_len=seq),
        steps=args.steps,
        directory=args.directory,
        name="models.bert:demo",
    )
    unseen = jp.data.Loader(validation, batch_size=rows, seq_len=seq)
    said = [program.eval_step(fitted.state, program.plan.batch(unseen.batch(index))) for index in range(8)]
    loss = sum(float(each["loss"] * each["weight"]) for each in said) / sum(float(each["weight"]) for each in said)
    frequencies = jp.data.unigram_entropy(validation)
    print(f"""
validation, nats per masked byte
  {frequencies:.3f}  byte frequencies, at best
  {loss:.3f}  this model after {fitted.steps} steps{"" if loss < frequencies else ": not there yet"}""")
    return int(loss >= frequencies)


if __name__ == "__main__":
    sys.exit(main())
