"""Weights of transformers in and out of the reference decoder, sharded: the same logits, nothing lost on the way."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import jaxpar as jp
from jaxpar import _tree
from models import gpt
from models.gpt import GPT, config, hf

SHAPE = {"vocab_size": 96, "num_layers": 2, "embed_dim": 32, "num_heads": 4, "mlp_dim": 48, "max_positions": 24}
LLAMA = dataclasses.replace(config.TINY, **SHAPE, num_kv_heads=2, tied=False, rope_theta=5_000.0, norm_eps=1e-6)
CASES = {
    "llama": LLAMA,
    "mistral, every head its own, tied": dataclasses.replace(LLAMA, num_kv_heads=4, tied=True, window=7),
    "gpt2": dataclasses.replace(config.GPT2_SMALL, **SHAPE, num_kv_heads=4),
}
TOKENS = np.random.default_rng(0).integers(0, 96, (8, 24), np.int32)


def theirs(cfg):
    import torch
    import transformers

    shared = {"vocab_size": cfg.vocab_size, "tie_word_embeddings": cfg.tied}
    if cfg.norm == "layer":
        made = transformers.GPT2Config(
            n_positions=cfg.max_positions, n_embd=cfg.embed_dim, n_layer=cfg.num_layers, n_head=cfg.num_heads,
            n_inner=cfg.mlp_dim, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **shared,
        )  # fmt: skip
    else:
        llama = {
            "hidden_size": cfg.embed_dim, "intermediate_size": cfg.mlp_dim, "num_hidden_layers": cfg.num_layers,
            "num_attention_heads": cfg.num_heads, "num_key_value_heads": cfg.num_kv_heads,
            "rms_norm_eps": cfg.norm_eps, "max_position_embeddings": cfg.max_positions, **shared,
            "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        }  # fmt: skip
        if cfg.window is None:
            made = transformers.LlamaConfig(**llama)
        else:
            made = transformers.MistralConfig(**llama, sliding_window=cfg.window)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(made)
    with torch.no_grad():
        for each in model.parameters():  # biases and norms too: zeros and ones would hide one that is left out
            each.add_(0.1 * torch.randn_like(each))
    return model.eval()


def logits_of(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


@nnx.jit
def logits(model):
    return model(jnp.asarray(TOKENS)) @ model.head()


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name, tmp_path):
    """Its logits are those of transformers, on data 2 x fsdp 2 x tensor 2; after a step, those there are ours."""
    import transformers

    cfg = CASES[name]
    model = theirs(cfg)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    assert hf.read_config(tmp_path / "theirs") == cfg

    program = gpt.recipe(cfg, batch=8, warmup=1, steps=10).on(jp.mesh(data=2, fsdp=2, tensor=2))
    state = program.init()
    ours = state["model"]
    before = {path: leaf.sharding for path, leaf in _tree.leaves(ours).items()}
    assert hf.load(tmp_path / "theirs", ours) is ours
    assert {path: leaf.sharding for path, leaf in _tree.leaves(ours).items()} == before
    np.testing.assert_allclose(logits(ours), logits_of(model), rtol=0, atol=1e-4)

    if name != "mistral, every head its own, tied":  # a compilation less
        batch = {
            "tokens": TOKENS, "labels": np.roll(TOKENS, -1, 1),
            "positions": np.tile(np.arange(24, dtype=np.int32), (8, 1)), "segments": np.zeros((8, 24), np.int32),
            "weights": np.ones((8, 24), np.float32), "sample": np.arange(8, dtype=np.int32),
        }  # fmt: skip
        state, _ = program.step(state, program.plan.batch(batch))
        ours = state["model"]
        assert np.abs(np.asarray(logits(ours)) - logits_of(model)).max() > 1e-3  # the step was a step

    hf.save(tmp_path / "ours", ours, file_bytes=20_000)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(logits_of(back), logits(ours), rtol=0, atol=1e-4)


@pytest.mark.parametrize("cfg", [CASES["mistral, every head its own, tied"], CASES["gpt2"]], ids=["mistral", "gpt2"])
def test_without_transformers(cfg, tmp_path):
    """What is written is read again as it was, its shape by `config.json`; also with the bare names of the hub."""
    model = GPT(cfg, rngs=nnx.Rngs(0))
    hf.save(tmp_path / "saved", model, dtype="bfloat16")
    assert hf.read_config(tmp_path / "saved") == cfg
    prefix = "transformer." if cfg.norm == "layer" else "model."
    found = safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors")
    (tmp_path / "bare").mkdir()
    bare = {name.removeprefix(prefix): value for name, value in found.items()} | {"h.0.attn.bias": np.ones(1)}
    safetensors.numpy.save_file(bare, tmp_path / "bare" / "model.safetensors")
    for home in ("saved", "bare"):
        back = hf.load(tmp_path / home, GPT(cfg, rngs=nnx.Rngs(1)), cast=True)
        for path, leaf in _tree.leaves(back).items():
            assert leaf.dtype == jnp.float32
            rounded = _tree.leaves(model)[path].astype(jnp.bfloat16).astype(jnp.float32)
            assert (leaf == rounded).all(), path


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model_type": "bert"}, "model_type is 'bert', and `models.gpt` reads 'gpt2', 'llama' and 'mistral'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_parameters": None}, "scales rotary positions"),
        ({"attention_bias": True}, "attention_bias: True, and `models.gpt` computes False"),
        ({"head_dim": 16}, "head_dim: 16, and `models.gpt` computes 8"),
    ],
)
def test_what_the_model_does_not_compute_is_refused(change, line, tmp_path):
    said = {**hf._describe(LLAMA), **change}
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError) as found:
        hf.read_config(tmp_path)
    assert line in str(found.value)
    (tmp_path / "config.json").write_text(json.dumps(hf._describe(LLAMA)))
    assert hf.read_config(tmp_path) == LLAMA


def test_a_shape_of_neither_family_is_not_written(tmp_path):
    mixed = dataclasses.replace(LLAMA, norm="layer", bias=True)
    with pytest.raises(ValueError, match="positions='rotary', and GPT2LMHeadModel has 'learned'"):
        hf.save(tmp_path / "saved", GPT(mixed, rngs=nnx.Rngs(0)))
