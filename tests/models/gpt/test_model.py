import dataclasses
import functools as ft
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import gpt
from models.gpt import GPT, config, generate
from models.gpt.model import Attention, Block, Norm, rotate

GPT2 = dataclasses.replace(config.TINY, positions="learned", norm="layer", mlp="gelu", bias=True, num_kv_heads=4)
LLAMA = config.TINY
UNTIED = dataclasses.replace(config.TINY, tied=False, num_kv_heads=1)
families = pytest.mark.parametrize("cfg", [GPT2, LLAMA, UNTIED], ids=["gpt2", "llama", "untied"])
B, T = 3, 10

forward = nnx.jit(lambda model, *args: model(*args))
loss = nnx.jit(gpt.loss)


@ft.cache
def model_of(cfg, dtype=jnp.float32):
    """A model whose vectors are not all ones and zeros, so that leaving one out would show."""

    @nnx.jit
    def make():
        model = GPT(cfg, rngs=nnx.Rngs(0))
        random = nnx.Rngs(1)
        moved = lambda leaf: (leaf + 0.1 * random.normal(leaf.shape)).astype(dtype)
        nnx.update(model, jax.tree.map(moved, nnx.state(model, nnx.Param)))
        return model

    return make()


def batch_of(seed=0):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 256, (B, T + 1), np.int32)
    return {"tokens": jnp.asarray(tokens[:, :-1]), "labels": jnp.asarray(tokens[:, 1:]), "sample": jnp.arange(B)}


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("GPT2_SMALL", 124_439_808),
        ("GPT2_MEDIUM", 354_823_168),
        ("GPT2_LARGE", 774_030_080),
        ("GPT2_XL", 1_557_611_200),
        ("LLAMA_1B", 1_235_814_400),
        ("LLAMA_7B", 6_738_415_616),
        ("LLAMA_8B", 8_030_261_248),
        ("LLAMA_13B", 13_015_864_320),
        ("LLAMA_34B", 33_743_970_304),
        ("LLAMA_70B", 70_553_706_496),
    ],
)
def test_named_sizes_have_the_published_number_of_parameters(name, published):
    model = nnx.eval_shape(lambda: GPT(getattr(config, name), rngs=nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == published


def naive_forward(model, tokens):
    """Logits with every step written out in numpy and float64: no scan, no fused attention, heads one at a time."""
    cfg = model.cfg
    get = lambda variable: np.asarray(variable[...], np.float64)

    def norm(x, module, layer=()):
        if cfg.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * get(module.scale)[layer]
        return x + get(module.bias)[layer] if cfg.bias else x

    def linear(x, module, layer):
        y = x @ get(module.kernel)[layer]
        return y + get(module.bias)[layer] if cfg.bias else y

    def turned(x):  # [T, H] as complex numbers
        half = cfg.head_dim // 2
        z = x[:, :half] + 1j * x[:, half:]
        z = z * np.exp(1j * np.arange(T)[:, None] * cfg.rope_theta ** (-np.arange(half) / half))
        return np.concatenate([z.real, z.imag], -1)

    def attention(x, module, layer):
        q, k, v = (linear(x, one, layer) for one in (module.q, module.k, module.v))
        size, shared, heads = cfg.head_dim, cfg.num_heads // cfg.num_kv_heads, []
        for head in range(cfg.num_heads):
            at, kv_at = (slice(i * size, (i + 1) * size) for i in (head, head // shared))
            one_q, one_k = (
                (turned(q[:, at]), turned(k[:, kv_at])) if cfg.positions == "rotary" else (q[:, at], k[:, kv_at])
            )
            scores = one_q @ one_k.T / np.sqrt(size)
            scores[np.triu_indices(T, 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, kv_at])
        return linear(np.concatenate(heads, -1), module.o, layer)

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def mlp(x, module, layer):
        up = linear(x, module.up, layer)
        if cfg.mlp == "gelu":
            return linear(gelu(up), module.down, layer)
        gate = linear(x, module.gate, layer)
        return linear(gate / (1 + np.exp(-gate)) * up, module.down, layer)

    x = get(model.embed.embedding)[tokens]
    if cfg.positions == "learned":
        x = x + get(model.positions)[:T]
    block = model.blocks.each
    for layer in range(cfg.num_layers):
        x = x + attention(norm(x, block.attn_norm, layer), block.attn, layer)
        x = x + mlp(norm(x, block.mlp_norm, layer), block.mlp, layer)
    head = get(model.embed.embedding).T if cfg.tied else get(model.lm_head.kernel)
    return norm(x, model.norm) @ head


@families
def test_the_loss_is_that_of_the_model_written_out(cfg):
    """Learned and rotary positions, both norms, both MLPs, shared heads, tied and not; scanned and not."""
    model, batch = model_of(cfg), batch_of()
    total, weight = loss(model, batch)
    expected = 0.0
    for tokens, labels in zip(np.asarray(batch["tokens"]), np.asarray(batch["labels"]), strict=True):
        logits = naive_forward(model, tokens)
        log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        expected += (log_sum - logits[np.arange(T), labels]).sum()
    assert weight == B * T
    np.testing.assert_allclose(total, expected, rtol=2e-6)


@families
def test_the_stack_is_its_blocks_one_after_another(cfg):
    model, x = model_of(cfg), jax.random.normal(jax.random.key(2), (B, T, cfg.embed_dim))
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    rest = (positions, jnp.zeros_like(positions), None)
    graphdef, state = nnx.split(model.blocks.each)
    stream = (x, jax.random.key(0))
    for layer in range(cfg.num_layers):
        block: Block = nnx.merge(graphdef, jax.tree.map(lambda leaf, layer=layer: leaf[layer], state))
        stream = forward(block, stream, *rest)
    found, _ = forward(model.blocks, (x, jax.random.key(0)), *rest)
    np.testing.assert_allclose(found, stream[0], rtol=1e-5, atol=1e-6 * float(jnp.abs(found).max()))


@families
def test_no_token_sees_a_later_one(cfg):
    model, batch = model_of(cfg), batch_of()
    changed = batch["tokens"].at[:, 6].add(1)
    before, after = forward(model, batch["tokens"]), forward(model, changed)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (jnp.abs(before[:, 6:] - after[:, 6:]).max(-1) > 0).all()


@families
def test_packed_segments_are_as_if_alone(cfg):
    """Two texts in one sequence give the hidden states that each gives by itself."""
    model, tokens = model_of(cfg), batch_of()["tokens"]
    positions = jnp.broadcast_to(jnp.array([*range(4), *range(6)]), (B, T))
    segments = jnp.broadcast_to(jnp.array([0] * 4 + [1] * 6), (B, T))
    packed = forward(model, tokens, positions, segments)
    np.testing.assert_allclose(packed[:, :4], forward(model, tokens[:, :4]), atol=5e-6)
    np.testing.assert_allclose(packed[:, 4:], forward(model, tokens[:, 4:]), atol=5e-6)


def test_a_permuted_sequence_is_the_same_sequence():
    """Nothing but `positions` says where a token is: context parallelism relies on it."""
    model, tokens = model_of(LLAMA), batch_of()["tokens"]
    order = np.random.default_rng(0).permutation(T)
    positions = jnp.broadcast_to(jnp.asarray(order), (B, T))
    permuted = forward(model, tokens[:, order], positions)
    np.testing.assert_allclose(permuted, forward(model, tokens)[:, order], atol=5e-6)


def test_rotation_depends_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(at_q, at_k):
        turned = [rotate(x, jnp.full((1, 1), at), 100.0) for x, at in ((q, at_q), (k, at_k))]
        return float(jnp.vdot(*turned))

    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
    assert abs(score(7, 3) - score(8, 3)) > 1e-3


def test_shared_heads_are_repeated_heads():
    """Grouped-query attention equals full attention whose key and value heads are copies."""
    few = Attention(LLAMA, rngs=nnx.Rngs(0))
    many = Attention(dataclasses.replace(LLAMA, num_kv_heads=4), rngs=nnx.Rngs(0))
    many.q, many.o = few.q, few.o
    for name in ("k", "v"):
        kernel = getattr(few, name).kernel[...].reshape(LLAMA.embed_dim, LLAMA.num_kv_heads, -1)
        getattr(many, name).kernel[...] = jnp.repeat(kernel, 2, axis=1).reshape(LLAMA.embed_dim, -1)
    x = jax.random.normal(jax.random.key(0), (B, T, LLAMA.embed_dim))
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    args = (x, positions, jnp.zeros_like(positions))
    np.testing.assert_allclose(few(*args), many(*args), atol=1e-6)


@families
def test_bfloat16_is_kept_with_statistics_in_float32(cfg):
    """The dtype of the parameters as read is that of the residual stream; the loss stays near the float32 one."""
    narrow, wide, batch = model_of(cfg, jnp.bfloat16), model_of(cfg), batch_of()
    assert nnx.eval_shape(narrow, batch["tokens"]).dtype == jnp.bfloat16
    total, _ = loss(narrow, batch)
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, loss(wide, batch)[0], rtol=0.02)


def test_norm_statistics_survive_a_large_mean():
    """In bfloat16 the mean of squares near 300² would lose the variance of 1 entirely."""
    x = (300 + jax.random.normal(jax.random.key(0), (1, 4, GPT2.embed_dim))).astype(jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    norm = Norm(GPT2)
    norm.scale, norm.bias = nnx.Param(jnp.ones(GPT2.embed_dim, x.dtype)), nnx.Param(jnp.zeros(GPT2.embed_dim, x.dtype))
    np.testing.assert_allclose(np.asarray(norm(x), np.float64), expected, atol=0.02)


def test_weights_mask_the_loss():
    model, batch = model_of(LLAMA), batch_of()
    weights = jnp.zeros((B, T)).at[1].set(1)
    masked = loss(model, {**batch, "weights": weights})
    alone = loss(model, {name: field[1:2] for name, field in batch.items()})
    assert masked[1] == alone[1] == T
    np.testing.assert_allclose(masked[0], alone[0], rtol=1e-6)


def test_dropout_masks_belong_to_examples_and_layers():
    """An example keeps its masks wherever it lies in a batch; two layers, and two ids, have different ones."""
    model, batch = nnx.clone(model_of(dataclasses.replace(LLAMA, dropout=0.2))), batch_of()
    run = lambda tokens, sample: forward(model, tokens, None, None, sample)
    whole = run(batch["tokens"], batch["sample"])
    np.testing.assert_allclose(run(batch["tokens"][1:], batch["sample"][1:]), whole[1:], atol=2e-6)
    assert jnp.abs(run(batch["tokens"], batch["sample"] + 9) - whole).max() > 0.01
    model.eval()
    np.testing.assert_allclose(run(batch["tokens"], None), forward(model_of(LLAMA), batch["tokens"]), atol=2e-6)


def test_dropout_without_ids_is_an_error():
    with pytest.raises(ValueError, match=r"dropout=0\.2 needs `sample`, an id for each example; or call `model\.eval"):
        model_of(dataclasses.replace(LLAMA, dropout=0.2))(batch_of()["tokens"])


def test_the_stream_starts_small_and_grows_by_half_a_block_each():
    """Depth-scaled initialisation: at 2 or 16 layers, the stream leaves with about the same size."""
    sizes = []
    for num_layers in (2, 16):
        cfg = dataclasses.replace(LLAMA, num_layers=num_layers, embed_dim=128)
        model = nnx.jit(lambda cfg=cfg: GPT(cfg, rngs=nnx.Rngs(0)))()
        x = jax.random.normal(jax.random.key(0), (1, T, 128))
        positions = jnp.arange(T)[None]
        stream, _ = forward(model.blocks, (x, jax.random.key(0)), positions, jnp.zeros_like(positions), None)
        sizes.append(float(stream.std()))
    assert 1 < sizes[0] < 1.6
    assert abs(sizes[0] - sizes[1]) < 0.25


def test_generate_takes_the_likeliest_at_temperature_zero():
    model, prompt = model_of(LLAMA), batch_of()["tokens"][:, :4]
    text = generate(model, prompt, 5, key=jax.random.key(0), temperature=0.0)
    assert text.shape == (B, 9)
    for length in (4, 8):
        hidden = forward(model, text[:, :length])[:, -1]
        np.testing.assert_array_equal(text[:, length], (hidden @ model.head()).argmax(-1))


def test_generate_draws_anew_with_another_key():
    model, prompt = model_of(LLAMA), batch_of()["tokens"][:, :4]
    one, same, other = (generate(model, prompt, 8, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_generate_stops_at_the_last_position():
    model, prompt = model_of(LLAMA), batch_of()["tokens"]
    with pytest.raises(ValueError, match=r"10 tokens and 60 steps are 70 positions, .* max_positions=64"):
        generate(model, prompt, 60, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "embed_dim=32 is no multiple of num_heads=5. Change one of the two."),
        ({"num_kv_heads": 3}, "num_heads=4 is no multiple of num_kv_heads=3. Change one of the two."),
        ({"embed_dim": 36}, "Rotary positions rotate pairs of features, but a head has 9"),
    ],
)
def test_shapes_that_do_not_fit_are_errors(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        dataclasses.replace(config.TINY, **changes)
