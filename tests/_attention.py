"""Attention written out, all scores at once, and what the tests of `jp.attention` give it."""

import jax
import jax.numpy as jnp
import numpy as np

MASKS = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": 7},
    "both sides": {"causal": False, "window": 4},
    "segments": {"causal": True, "segments": True},
    "all": {"causal": False},
}
LAYOUTS = {"mha": 8, "gqa": 4, "mqa": 1}  # key heads for 8 query heads


def inputs(length, key_heads, *, rows=2, heads=8, features=4, seed=0):
    """q, k, v, what the result is multiplied by, positions and segments; a segment ends within every chunk."""
    draw = np.random.default_rng(seed)
    shapes = [(rows, length, number, features) for number in (heads, key_heads, key_heads, heads)]
    q, k, v, out = (draw.normal(size=shape).astype(np.float32) for shape in shapes)
    ends = np.sort(draw.integers(0, length, (rows, 5)))
    segments = (np.arange(length)[None, :, None] >= ends[:, None]).sum(-1).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return {"q": q, "k": k, "v": v, "out": out, "positions": positions, "segments": segments}


def written_out(given, *, causal=True, window=None, segments=False, scale=None):
    """Softmax attention by its definition, in the dtype of the inputs."""
    q, k, v, at = given["q"], given["k"], given["v"], given["positions"]
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqnh,bsnh->bnqs", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    far = at[:, :, None] - at[:, None]
    seen = (far >= 0) if causal else jnp.full(far.shape, True)
    if window is not None:
        seen &= abs(far) < window
    if segments:
        seen &= given["segments"][:, :, None] == given["segments"][:, None]
    return jnp.einsum("bnqs,bsnh->bqnh", jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf)), v)


def results(attend, given):
    """The outputs and the gradients of q, k and v."""

    def total(q, k, v, given):
        out = attend({**given, "q": q, "k": k, "v": v})
        return (out * given["out"]).sum(), out

    (_, out), grads = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(
        given["q"], given["k"], given["v"], given
    )
    return {"out": out, **dict(zip(("d_q", "d_k", "d_v"), grads, strict=True))}


def reference(given, **mask):
    """The results in float32 and in float64, of what is written out."""
    narrow = jax.jit(lambda given: results(lambda x: written_out(x, **mask), given))(given)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = {name: x.astype(np.float64) if x.dtype == np.float32 else x for name, x in given.items()}
        true = jax.jit(lambda given: results(lambda x: written_out(x, **mask), given))(wide)
        return jax.tree.map(np.asarray, narrow), jax.tree.map(np.asarray, true)
