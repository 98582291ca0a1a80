"""`jaxpar train`: text, a recipe and a mesh, put together."""

from typing import TYPE_CHECKING

import jax
import numpy as np

from .. import data, run
from .._cache import compilation_cache
from .._cluster import initialize
from .._errors import StepError
from .._recipe import Program
from . import _load

if TYPE_CHECKING:
    from ._commands import Train


def train(command: "Train") -> int:
    """Train as `command` says; the exit code.

    Raises:
        StepError: The recipe's batch is not one of text, or its vocabulary too small.
    """
    initialize()
    compilation_cache(command.cache / "compiled")
    program = _load.program(command.recipe, command.mesh)
    batch_size, seq_len = _shape(program, command.recipe)
    files = data.text_files(command.data) if command.data else data.stdlib_sources()
    tokenizer = data.HuggingFace(command.tokenizer) if command.tokenizer else None
    _check_vocabulary(program, data.Bytes() if tokenizer is None else tokenizer, command.recipe)
    tokens = data.tokenise(files, command.cache / "tokens", tokenizer)
    split = tokens.split(command.validation)
    print(program, flush=True)
    print(f"{split.train.num_tokens:,} tokens to train on, {split.validation.num_tokens:,} to evaluate on", flush=True)
    fitted = run.fit(
        program,
        data.Loader(split.train, batch_size=batch_size, seq_len=seq_len, seed=command.seed),
        steps=command.steps,
        directory=command.directory,
        resume=command.resume,
        every=int(command.every) if command.every.isdigit() else command.every,
        eval_data=data.Loader(split.validation, batch_size=batch_size, seq_len=seq_len, seed=None, epochs=1),
        eval_every=command.eval_every,
        name=command.recipe,
    )
    (fitted.directory / "plan.json").write_text(program.plan.to_json())
    program.plan.draw().save(fitted.directory / "plan.svg")
    said = ", ".join(f"{name} {value:.4g}" for name, value in sorted(fitted.metrics.items()))
    print(f"{fitted.steps} steps in {fitted.directory}: {said}")
    return fitted.exit_code


def _shape(program: Program, name: str) -> tuple[int, int]:
    """Batch size and sequence length of a recipe on text."""
    batch = program.recipe.batch
    fields = sorted(batch) if isinstance(batch, dict) else [type(batch).__name__]
    shapes = [np.shape(batch[field]) for field in ("tokens", "labels")] if {"tokens", "labels"} <= set(fields) else []
    if len(shapes) != 2 or len(shapes[0]) != 2 or shapes[0] != shapes[1]:
        shown = jax.tree.map(np.shape, batch)
        raise StepError(
            f"{name}: jaxpar train reads text, for recipes whose batch has tokens and labels of one shape [batch, "
            f"sequence]; this one has {shown}. For other data write the loop: jp.fit(recipe.on(mesh), data, ...)."
        )
    return shapes[0]


def _check_vocabulary(program: Program, tokenizer: data.Tokenizer, name: str) -> None:
    """Refuse a tokeniser with more ids than any parameter of the model has rows or columns."""
    largest = max(max(record.shape, default=0) for record in program.plan.records.values())
    if tokenizer.vocab_size > largest:
        raise StepError(
            f"{name}: {tokenizer!r} makes {tokenizer.vocab_size} token ids, but no dim of the model is that large "
            f"(the largest is {largest}), so some would have no embedding. Enlarge the model's vocabulary."
        )
