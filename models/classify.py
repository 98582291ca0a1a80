"""What image classifiers share: their loss, and a demo that learns handwritten digits over 8 simulated devices."""

import argparse
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxpar as jp

from . import data

Batch = dict[str, Any]
"""`image` [B, height, width, channels] and `label` [B]; `weight` [B] where rows fill up a batch."""


def loss(model: Any, batch: Batch) -> tuple[tuple[jax.Array, jax.Array], dict[str, jax.Array]]:
    """The sum of the cross-entropies and how many there are; and `accuracy`, the share that is right."""
    logits = model(batch["image"]).astype(jnp.float32)  # B C
    weights = batch.get("weight", jnp.ones(len(logits)))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    right = (logits.argmax(-1) == batch["label"]).astype(jnp.float32)
    weight = weights.sum()
    return ((losses * weights).sum(), weight), {"accuracy": (right * weights).sum() / jnp.maximum(weight, 1e-9)}


def batch_of(size: int, *, image: int, channels: int) -> Batch:
    """The shapes of a batch."""
    return {
        "image": jax.ShapeDtypeStruct((size, image, image, channels), jnp.float32),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
        "sample": jax.ShapeDtypeStruct((size,), jnp.int32),
    }


def demo(name: str, recipe: jp.Recipe, mesh: Any, *, goal: float, steps: int, argv: list[str] | None = None) -> int:
    """Train on the digits, and print the accuracy on unseen ones: 0 if it is above `goal`.

    Args:
        name: The model's folder.
        recipe: Of images of 8 x 8.
        mesh: Where.
        goal: An accuracy.
        steps: How many, if the command line does not say.
        argv: The command line.
    """
    parser = argparse.ArgumentParser(prog=f"python -m models.{name}")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--directory", type=pathlib.Path, help="where to keep the run; a temporary one if not given")
    args = parser.parse_args(argv)

    jp.compilation_cache(".cache/jaxpar/compiled")
    program = recipe.on(mesh)
    print(program)
    train, validation = data.digits()
    size = recipe.batch_size
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.directory or pathlib.Path(temporary, "run")
        loader = jp.data.Loader(train, batch_size=size)
        fitted = jp.fit(program, loader, steps=args.steps, directory=directory, name=f"models.{name}:demo")
    unseen = jp.data.Loader(validation, batch_size=size, seed=None)
    batches = [program.plan.batch(unseen.batch(index)) for index in range(len(validation) // size)]
    accuracy = sum(float(program.eval_step(fitted.state, batch)["accuracy"]) for batch in batches) / len(batches)
    print(f"{accuracy:.1%} of {len(validation)} unseen digits are right after {fitted.steps} steps; 10% is chance")
    return int(accuracy < goal)
