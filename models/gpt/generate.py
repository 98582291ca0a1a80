"""`generate`: text from a model, one token at a time.

Every token runs the whole sequence again: nothing is cached, which is simple, compiles once, and is fast enough for a
look at what a small model has learnt.
"""

import functools as ft

import jax
import jax.numpy as jnp
from flax import nnx

from .model import GPT


@ft.partial(nnx.jit, static_argnames=("steps", "temperature"))
def generate(model: GPT, prompt: jax.Array, steps: int, *, key: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Continue `prompt` by `steps` tokens.

    Args:
        model: In evaluation mode, if it has dropout.
        prompt: [B, P] integers; P + `steps` are at most `max_positions`.
        steps: How many tokens to add.
        key: Draws them.
        temperature: 1 draws from the model's distribution, less prefers its favourites, 0 takes them.

    Returns:
        [B, P + steps].
    """
    start, length = prompt.shape[1], prompt.shape[1] + steps
    if length > model.cfg.max_positions:
        raise ValueError(
            f"a prompt of {start} tokens and {steps} steps are {length} positions, but the model has "
            f"max_positions={model.cfg.max_positions}. Ask for fewer steps, or cut the prompt."
        )

    def step(tokens: jax.Array, at: jax.Array) -> tuple[jax.Array, None]:
        hidden = jax.lax.dynamic_index_in_dim(model(tokens), at - 1, axis=1, keepdims=False)  # B D
        logits = jnp.dot(hidden, model.head(), preferred_element_type=jnp.float32)  # B V
        if temperature == 0:
            chosen = logits.argmax(-1)
        else:
            chosen = jax.random.categorical(jax.random.fold_in(key, at), logits / temperature)
        return tokens.at[:, at].set(chosen.astype(tokens.dtype)), None

    tokens = jnp.pad(prompt, ((0, 0), (0, steps)))  # what follows a position does not change it
    return jax.lax.scan(step, tokens, start + jnp.arange(steps))[0]
