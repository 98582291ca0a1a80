"""What models of text share: the shapes of their batches, and a demo that learns Python from the standard library."""

import argparse
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

import jaxpar as jp

from . import data


def batch_of(size: int, seq: int) -> dict[str, Any]:
    """The shapes of a batch, as `jp.data.Loader` makes it of a `TokenFile`."""
    tokens, weights = (jax.ShapeDtypeStruct((size, seq), dtype) for dtype in (jnp.int32, jnp.float32))
    return {
        "tokens": tokens,
        "labels": tokens,
        "positions": tokens,
        "segments": tokens,
        "weights": weights,
        "sample": jax.ShapeDtypeStruct((size,), jnp.int32),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learnt:
    """How a demo went.

    Attributes:
        steps: How many were done.
        said: What the evaluation says of each of eight batches of unseen files.
        unseen: Those files.
    """

    steps: int
    said: list[dict[str, Any]]
    unseen: jp.data.TokenFile


def learn(name: str, recipe: jp.Recipe, mesh: Any, *, steps: int, about: str | None, argv: list[str] | None) -> Learnt:
    """Train on the standard library's sources, and evaluate on files that were kept apart.

    Args:
        name: The model's folder.
        recipe: Of bytes.
        mesh: Where.
        steps: How many, if the command line does not say.
        about: What the command's help says.
        argv: The command line.
    """
    parser = argparse.ArgumentParser(prog=f"python -m models.{name}", description=about)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("runs", name))
    args = parser.parse_args(argv)

    jp.compilation_cache(".cache/jaxpar/compiled")
    program = recipe.on(mesh)
    print(program)
    train, validation = data.text()
    rows, seq = recipe.batch["tokens"].shape
    loader = jp.data.Loader(train, batch_size=rows, seq_len=seq)
    fitted = jp.fit(program, loader, steps=args.steps, directory=args.directory, name=f"models.{name}:demo")
    unseen = jp.data.Loader(validation, batch_size=rows, seq_len=seq)
    said = [program.eval_step(fitted.state, program.plan.batch(unseen.batch(index))) for index in range(8)]
    return Learnt(steps=fitted.steps, said=said, unseen=validation)
