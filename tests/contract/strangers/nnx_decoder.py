"""Learn a toy language with a decoder in Flax NNX, on one device.

The language: brackets of several kinds, nested and balanced, with letters between them. A model that has learnt it
closes what it opened. Run as a script it trains for some steps, prints the loss and writes a few samples.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

# ---- configuration


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 64
    context: int = 8
    width: int = 64
    hidden: int = 160
    depth: int = 3
    num_heads: int = 8
    num_kv_heads: int = 4
    rope_base: float = 10_000.0
    logit_cap: float = 30.0

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    batch_size: int = 8
    steps: int = 10
    peak_lr: float = 3e-3
    warmup: int = 4
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    log_every: int = 5


# ---- data


OPEN, CLOSE = "([{<", ")]}>"
LETTERS = "abcdefghijklmnopqrstuvwxyz .,;"
ALPHABET = "\n" + OPEN + CLOSE + LETTERS
CODE = {letter: index for index, letter in enumerate(ALPHABET)}


def sentence(random: np.random.Generator, length: int) -> str:
    """Nested brackets with letters between them, cut off at `length`."""
    out: list[str] = []
    stack: list[int] = []
    while len(out) < length:
        choice = random.random()
        if choice < 0.25 and len(stack) < 4:
            stack.append(int(random.integers(len(OPEN))))
            out.append(OPEN[stack[-1]])
        elif choice < 0.5 and stack:
            out.append(CLOSE[stack.pop()])
        else:
            out.append(LETTERS[int(random.integers(len(LETTERS)))])
    return "".join(out)


def encode(text: str) -> np.ndarray:
    return np.array([CODE[letter] for letter in text], np.int32)


def decode(ids: np.ndarray) -> str:
    return "".join(ALPHABET[int(index) % len(ALPHABET)] for index in ids)


def batches(cfg: ModelConfig, train: TrainConfig) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches; every step has its own stream, so that a run can start anywhere."""
    step = 0
    while True:
        random = np.random.default_rng([train.seed, step])
        rows = [encode("\n" + sentence(random, cfg.context)) for _ in range(train.batch_size)]
        ids = np.stack(rows)
        counts = (ids[:, 1:] != CODE[" "]).astype(np.float32)
        yield {"inputs": ids[:, :-1], "targets": ids[:, 1:], "counts": counts}
        step += 1


# ---- model


def rope(x: jax.Array, base: float) -> jax.Array:
    """Rotate the halves of each head, x [B, T, N, H]."""
    length, half = x.shape[1], x.shape[-1] // 2
    speeds = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * speeds[None, :]
    sin, cos = jnp.sin(angles)[None, :, None, :], jnp.cos(angles)[None, :, None, :]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
    """Causal attention with fewer key and value heads than query heads."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        kv_width = cfg.num_kv_heads * cfg.head_width
        self.q = nnx.Linear(cfg.width, cfg.width, use_bias=False, rngs=rngs)
        self.k = nnx.Linear(cfg.width, kv_width, use_bias=False, rngs=rngs)
        self.v = nnx.Linear(cfg.width, kv_width, use_bias=False, rngs=rngs)
        self.o = nnx.Linear(cfg.width, cfg.width, use_bias=False, rngs=rngs)
        self.q_norm = nnx.RMSNorm(cfg.head_width, rngs=rngs)
        self.k_norm = nnx.RMSNorm(cfg.head_width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, _ = x.shape
        q = self.q(x).reshape(batch, length, self.cfg.num_heads, -1)
        k = self.k(x).reshape(batch, length, self.cfg.num_kv_heads, -1)
        v = self.v(x).reshape(batch, length, self.cfg.num_kv_heads, -1)
        q = rope(self.q_norm(q), self.cfg.rope_base)
        k = rope(self.k_norm(k), self.cfg.rope_base)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.reshape(batch, length, -1))


class FeedForward(nnx.Module):
    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.gate = nnx.Linear(cfg.width, cfg.hidden, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(cfg.width, cfg.hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(cfg.hidden, cfg.width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(cfg.width, rngs=rngs)
        self.attention = Attention(cfg, rngs=rngs)
        self.feed_norm = nnx.RMSNorm(cfg.width, rngs=rngs)
        self.feed = FeedForward(cfg, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed(self.feed_norm(x))


class Decoder(nnx.Module):
    """Tokens [B, T] to logits [B, T, V]; the embedding is also the head."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = nnx.Embed(cfg.vocab_size, cfg.width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.layers = nnx.List([Layer(cfg, rngs=rngs) for _ in range(cfg.depth)])
        self.norm = nnx.RMSNorm(cfg.width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.embed.attend(self.norm(x))
        return self.cfg.logit_cap * jnp.tanh(logits / self.cfg.logit_cap)


# ---- loss and metrics


def token_losses(model: Decoder, batch: dict[str, jax.Array]) -> jax.Array:
    """Cross-entropy of each token, [B, T]."""
    log_probs = jax.nn.log_softmax(model(batch["inputs"]))
    return -jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]


def loss_fn(model: Decoder, batch: dict[str, jax.Array]) -> jax.Array:
    """The mean over the tokens that count: blanks are anybody's guess."""
    losses = token_losses(model, batch)
    return (losses * batch["counts"]).sum() / batch["counts"].sum()


def bracket_accuracy(model: Decoder, batch: dict[str, jax.Array]) -> jax.Array:
    """How often a closing bracket is the most likely token where one comes."""
    first, last = CODE[CLOSE[0]], CODE[CLOSE[-1]]
    guesses = model(batch["inputs"]).argmax(-1)
    is_closing = (batch["targets"] >= first) & (batch["targets"] <= last)
    right = (guesses == batch["targets"]) & is_closing
    return right.sum() / jnp.maximum(is_closing.sum(), 1)


def make_schedule(cfg: TrainConfig) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(
        init_value=cfg.peak_lr / cfg.warmup,
        peak_value=cfg.peak_lr,
        warmup_steps=cfg.warmup,
        decay_steps=max(cfg.steps, cfg.warmup + 1),
        end_value=cfg.peak_lr / 10,
    )


def decays(params: nnx.State) -> nnx.State:
    """Norms are not decayed."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def make_optimizer(cfg: TrainConfig) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip),
        optax.adamw(make_schedule(cfg), b1=0.9, b2=0.95, weight_decay=cfg.weight_decay, mask=decays),
    )


# ---- evaluation and sampling


def evaluate(model: Decoder, cfg: ModelConfig, train: TrainConfig, count: int = 4) -> dict[str, float]:
    """Means over `count` batches that training does not see, each batch by the tokens that count in it."""

    @nnx.jit
    def measure(model: Decoder, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        losses = token_losses(model, batch)
        total = (losses * batch["counts"]).sum()
        return {"total": total, "count": batch["counts"].sum(), "brackets": bracket_accuracy(model, batch)}

    held_out = batches(cfg, dataclasses.replace(train, seed=train.seed + 1))
    found = [measure(model, next(held_out)) for _ in range(count)]
    tokens = sum(float(each["count"]) for each in found)
    return {
        "loss": sum(float(each["total"]) for each in found) / tokens,
        "perplexity": float(np.exp(sum(float(each["total"]) for each in found) / tokens)),
        "brackets closed right": sum(float(each["brackets"]) for each in found) / count,
    }


def sample(model: Decoder, key: jax.Array, count: int, length: int) -> list[str]:
    """`count` texts of `length` letters, one token at a time."""

    @nnx.jit
    def next_tokens(model: Decoder, tokens: jax.Array, at: jax.Array, key: jax.Array) -> jax.Array:
        logits = model(tokens)
        here = jax.lax.dynamic_index_in_dim(logits, at - 1, axis=1, keepdims=False)
        drawn = jax.random.categorical(key, here[:, : len(ALPHABET)])
        return jax.lax.dynamic_update_index_in_dim(tokens, drawn.astype(tokens.dtype), at, axis=1)

    tokens = jnp.zeros((count, model.cfg.context), jnp.int32)
    for at in range(1, min(length, model.cfg.context)):
        key, own = jax.random.split(key)
        tokens = next_tokens(model, tokens, jnp.int32(at), own)
    return [decode(row) for row in np.asarray(tokens)]


# ---- training


def train(cfg: ModelConfig, train_cfg: TrainConfig) -> tuple[list[float], Decoder, nnx.Optimizer]:
    model = Decoder(cfg, rngs=nnx.Rngs(train_cfg.seed))
    optimizer = nnx.Optimizer(model, make_optimizer(train_cfg), wrt=nnx.Param)

    @nnx.jit
    def train_step(model: Decoder, optimizer: nnx.Optimizer, batch: dict[str, jax.Array]) -> jax.Array:
        loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
        optimizer.update(model, grads)
        return loss

    losses = []
    started = time.perf_counter()
    for step, batch in enumerate(batches(cfg, train_cfg)):
        if step == train_cfg.steps:
            break
        loss = train_step(model, optimizer, batch)
        losses.append(float(loss))
        if (step + 1) % train_cfg.log_every == 0:
            rate = (step + 1) * train_cfg.batch_size * cfg.context / (time.perf_counter() - started)
            print(f"step {step + 1:4d}   loss {losses[-1]:.4f}   {rate:,.0f} tokens/s")
    return losses, model, optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for field in dataclasses.fields(TrainConfig):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    train_cfg = TrainConfig(**vars(parser.parse_args()))
    cfg = ModelConfig()
    losses, model, _ = train(cfg, train_cfg)
    print(f"first loss {losses[0]:.4f}, last loss {losses[-1]:.4f}")
    for name, value in evaluate(model, cfg, train_cfg).items():
        print(f"{name}: {value:.3f}")
    for text in sample(model, jax.random.key(0), 3, cfg.context):
        print(repr(text))


if __name__ == "__main__":
    main()
