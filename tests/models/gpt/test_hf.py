"""Weights of transformers in and out of the reference decoder, sharded: the same logits, and nothing lost on the way."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpar as jp
from models import gpt
from models.gpt import GPT, config, hf

SHAPE = {"vocab_size": 96, "num_layers": 2, "embed_dim": 32, "num_heads": 4, "mlp_dim": 48, "max_positions": 24}
LLAMA = dataclasses.replace(config.TINY, **SHAPE, num_kv_heads=2, tied=False, rope_theta=5_000.0, norm_eps=1e-6)
CASES = {
    "llama": LLAMA,
    "llama, every head its own, tied": dataclasses.replace(LLAMA, num_kv_heads=4, tied=True),
    "gpt2": dataclasses.replace(config.GPT2_SMALL, **SHAPE, num_kv_heads=4),
}
cases = pytest.mark.parametrize("cfg", CASES.values(), ids=CASES)
TOKENS = np.random.default_rng(0).integers(0, 96, (4, 24), np.int32)


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
        made = transformers.LlamaConfig(
            hidden_size=cfg.embed_dim, intermediate_size=cfg.mlp_dim, num_hidden_layers=cfg.num_layers,
            num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_kv_heads, rms_norm_eps=cfg.norm_eps,
            max_position_embeddings=cfg.max_positions, rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta}, **shared,
        )  # fmt: skip
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


def program_of(cfg, **axes):
    return gpt.recipe(cfg, batch=8, warmup=1, steps=10).on(jp.mesh(**axes))


@pytest.mark.torch
@cases
def test_there_and_back(cfg, tmp_path):
    """The logits of transformers, on data 2 x fsdp 2 x tensor 2; a step; and back in transformers, the logits of ours."""
    import transformers

    model = theirs(cfg)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    assert hf.read_config(tmp_path / "theirs") == cfg

    program = program_of(cfg, data=2, fsdp=2, tensor=2)
    state = program.init()
    before = {path: leaf.sharding for path, leaf in jp._tree.leaves(state["model"]).items()}
    hf.load(tmp_path / "theirs", state["model"])
    assert {path: leaf.sharding for path, leaf in jp._tree.leaves(state["model"]).items()} == before
    np.testing.assert_allclose(logits(state["model"]), logits_of(model), rtol=0, atol=1e-4)

    batch = {
        "tokens": np.tile(TOKENS, (2, 1)), "labels": np.tile(np.roll(TOKENS, -1, 1), (2, 1)),
        "positions": np.tile(np.arange(24, dtype=np.int32), (8, 1)), "segments": np.zeros((8, 24), np.int32),
        "weights": np.ones((8, 24), np.float32), "sample": np.arange(8, dtype=np.int32),
    }  # fmt: skip
    state, metrics = program.step(state, program.plan.batch(batch))
    assert np.isfinite(float(metrics["loss"]))

    hf.save(tmp_path / "ours", state["model"], file_bytes=20_000)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    trained = logits(state["model"])
    np.testing.assert_allclose(logits_of(back), trained, rtol=0, atol=1e-4)
    assert np.abs(np.asarray(trained) - logits_of(model)).max() > 1e-3  # the step was a step
