"""A recipe with another batch: as many rows as hold so many tokens, and sequences of another length."""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np

from .. import _tree
from .._errors import StepError
from .._recipe import Recipe

_BINARY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


def scaled(recipe: Recipe, batch: int | str | None, seq: int | None) -> Recipe:
    """`recipe` with its batch as asked for.

    Rows are the first dim of every array of the batch. The sequence is the second dim of those that have the second
    dim of the first array of integers [batch, sequence]. Arrays become shapes.

    Args:
        recipe: With a batch of any size.
        batch: Rows, as a number or as text; or tokens, `"4M-tokens"`, where k and M are 1,024 and 1,048,576 if that
            makes whole rows, as batches are counted, and 1,000 and 1,000,000 otherwise.
        seq: Tokens of a sequence.

    Raises:
        StepError: The batch has no sequence, tokens do not make whole rows, or another dim is as long as the sequence.

    Example:
        >>> from jaxpar.compare._scale import scaled
        >>> from models.gpt import llama_7b
        >>> scaled(llama_7b(), "4M-tokens", 2048).batch["tokens"].shape
        (2048, 2048)
    """
    if batch is None and seq is None:
        return recipe
    old = sequence_length(recipe)
    if seq is not None and seq < 1:
        raise StepError(f"compare: seq={seq}. Give the tokens of a sequence, at least 1.")
    if seq is not None and old is None:
        raise StepError(
            f"compare: seq={seq}, but the batch {_shapes(recipe)} has no array of integers [batch, sequence]. Leave "
            "seq out, or give a recipe with such a batch."
        )
    length = old if seq is None else seq
    rows = recipe.batch_size if batch is None else _rows(batch, length)
    if old is not None and seq not in (None, old):
        _check_other_dims(recipe, old)

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = list(np.shape(leaf))
        if shape:
            shape[0] = rows
        if len(shape) > 1 and shape[1] == old and length is not None:
            shape[1] = length
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

    return dataclasses.replace(recipe, batch=jax.tree.map(one, recipe.batch))


def sequence_length(recipe: Recipe) -> int | None:
    """The second dim of the first array of integers [batch, sequence]; `None` if the batch has none."""
    for leaf in jax.tree.leaves(recipe.batch):
        if np.ndim(leaf) > 1 and np.issubdtype(leaf.dtype, np.integer):
            return int(np.shape(leaf)[1])
    return None


def number(said: float | str) -> int:
    """A number of tokens to train on: `"300B"`, `"1T"`.

    Example:
        >>> from jaxpar.compare._scale import number
        >>> number("1T"), number("2.5B")
        (1000000000000, 2500000000)
    """
    if not isinstance(said, str):
        return int(said)
    match = re.fullmatch(r"([\d_,]*\.?\d+)\s*([kmgbt]?)", said.strip().lower())
    if match is None:
        raise StepError(f"compare: tokens={said!r} is not a number. Write 1T, 300B, or 300000000000.")
    return round(float(match[1].replace(",", "").replace("_", "")) * _DECIMAL[match[2]])


def _rows(batch: int | str, length: int | None) -> int:
    if isinstance(batch, int):
        if batch < 1:
            raise StepError(f"compare: batch={batch}. Give at least one row.")
        return batch
    match = re.fullmatch(r"([\d_,]*\.?\d+)\s*([kmg]?)(?:[-\s]*(tokens?|rows?|sequences?))?", batch.strip().lower())
    if match is None:
        raise StepError(f"compare: batch={batch!r}. Write rows, 1024, or tokens, 4M-tokens.")
    amount = float(match[1].replace(",", "").replace("_", ""))
    sizes = [amount * units[match[2]] for units in (_BINARY, _DECIMAL)]
    row = 1
    if (match[3] or "").startswith("token"):
        if length is None:
            raise StepError(
                f"compare: batch={batch!r}, but the batch of this recipe has no sequence. Give its rows, batch=1024."
            )
        row = length
    for size in sizes:
        if size % row == 0 and size >= row:
            return int(size) // row
    below = math.floor(sizes[0] / row)
    fits = [str(count * row) for count in (below, below + 1) if count]
    raise StepError(
        f"compare: batch={batch!r} is {sizes[0]:,.0f} tokens, no whole number of sequences of {row}. Nearest: "
        f"{' or '.join(fits)} tokens."
    )


def _check_other_dims(recipe: Recipe, old: int) -> None:
    faults = [
        f"{path} {tuple(np.shape(leaf))}"
        for path, leaf in _tree.leaves(recipe.batch).items()
        if old in np.shape(leaf)[2:]
    ]
    if faults:
        raise StepError(
            f"compare: the sequence of {old} may also be a later dim of {', '.join(faults)}. Leave seq out, and give a "
            "recipe whose batch has the length that you want."
        )


def _shapes(recipe: Recipe) -> Any:
    return {path: tuple(np.shape(leaf)) for path, leaf in _tree.leaves(recipe.batch).items()}
