"""Weights of Mixtral, BERT, ViT and ResNet of transformers, in and out, sharded: the same logits, nothing lost."""

import dataclasses
import functools as ft
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from jaxpar import CheckpointError, _tree
from models import bert, moe, resnet, vit
from models.bert import config as bert_config, hf as bert_hf
from models.moe import config as moe_config, hf as moe_hf
from models.resnet import config as resnet_config, hf as resnet_hf
from models.vit import config as vit_config, hf as vit_hf
from tests import _programs as programs

HF = {"moe": moe_hf, "bert": bert_hf, "vit": vit_hf, "resnet": resnet_hf, "resnet, basic": resnet_hf}
CASES = {
    "moe": dataclasses.replace(
        moe_config.TINY, vocab_size=96, num_shared=0, tied=False, window=7, rope_theta=5_000.0, norm_eps=1e-6,
        balance=0.02, z=0.0,
    ),
    "bert": dataclasses.replace(bert_config.TINY, vocab_size=96, mask=5, num_types=3, norm_eps=1e-6),
    "vit": dataclasses.replace(vit_config.TINY, channels=3, norm_eps=1e-6),
    "resnet": resnet_config.Config(depths=(2, 1), width=8, num_classes=10),
    "resnet, basic": resnet_config.Config(depths=(1, 1), width=8, num_classes=10, bottleneck=False),
}  # fmt: skip
RECIPES = {
    "moe": lambda cfg: moe.recipe(cfg, batch=8, seq=24),
    "bert": lambda cfg: bert.recipe(cfg, batch=8, seq=24),
    "vit": lambda cfg: vit.recipe(cfg, batch=8, learning_rate=1e-2, steps=10),
    "resnet": lambda cfg: resnet.recipe(cfg, batch=8, image=32),
}
MESHES = {
    "moe": {"data": 2, "expert": 2, "tensor": 2},
    "bert": {"data": 2, "fsdp": 2, "tensor": 2},
    "vit": {"fsdp": 4, "tensor": 2},
    "resnet": {"data": 4, "fsdp": 2},
}
RANDOM = np.random.default_rng(0)
TOKENS, TYPES = RANDOM.integers(0, 96, (8, 24), np.int32), RANDOM.integers(0, 3, (8, 24), np.int32)
REAL = np.arange(24) < RANDOM.integers(12, 25, (8, 1))  # the rest of a row is padding
IMAGES = {name: RANDOM.random((8, side, side, 3), np.float32) for name, side in (("vit", 8), ("resnet", 32))}


def theirs(name, cfg):
    import torch
    import transformers

    if name == "moe":
        made = transformers.MixtralConfig(
            **decoder(cfg), num_local_experts=cfg.num_experts, num_experts_per_tok=cfg.num_chosen,
            router_aux_loss_coef=cfg.balance, sliding_window=cfg.window,
        )  # fmt: skip
        auto = transformers.AutoModelForCausalLM
    elif name == "bert":
        made = transformers.BertConfig(
            **encoder(cfg), vocab_size=cfg.vocab_size, max_position_embeddings=cfg.max_positions,
            type_vocab_size=cfg.num_types, mask_token_id=cfg.mask,
        )  # fmt: skip
        auto = transformers.AutoModelForMaskedLM
    elif name == "vit":
        made = transformers.ViTConfig(
            **encoder(cfg), image_size=cfg.image, patch_size=cfg.patch, num_labels=cfg.num_classes
        )
        auto = transformers.AutoModelForImageClassification
    else:
        made = transformers.ResNetConfig(
            embedding_size=cfg.width, hidden_sizes=list(cfg.features), depths=list(cfg.depths),
            layer_type="bottleneck" if cfg.bottleneck else "basic", num_labels=cfg.num_classes,
        )  # fmt: skip
        auto = transformers.AutoModelForImageClassification
    torch.manual_seed(0)
    model = auto.from_config(made)
    # Biases, norms and statistics too: zeros and ones would hide one that is left out; and large enough for a GELU by
    # tanh to be seen.
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.3 * torch.randn_like(each))
        for path, each in model.named_buffers():
            if "running" in path:
                each.add_(torch.rand_like(each))
    return auto, model.eval()


def decoder(cfg):
    return {
        "vocab_size": cfg.vocab_size, "hidden_size": cfg.embed_dim, "intermediate_size": cfg.mlp_dim,
        "num_hidden_layers": cfg.num_layers, "num_attention_heads": cfg.num_heads, "rms_norm_eps": cfg.norm_eps,
        "num_key_value_heads": cfg.num_kv_heads, "max_position_embeddings": cfg.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
    }  # fmt: skip


def encoder(cfg):
    return {
        "hidden_size": cfg.embed_dim, "intermediate_size": cfg.mlp_dim, "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads, "layer_norm_eps": cfg.norm_eps,
    }  # fmt: skip


def logits_of(name, model):
    import torch

    with torch.no_grad():
        if name in IMAGES:
            return model(torch.tensor(IMAGES[name].transpose(0, 3, 1, 2))).logits.numpy()
        tokens, real, types = (torch.tensor(each, dtype=torch.long) for each in (TOKENS, REAL, TYPES))
        if name == "moe":
            return model(tokens).logits.numpy()
        return model(tokens, attention_mask=real, token_type_ids=types).logits.numpy()[REAL]


@ft.partial(nnx.jit, static_argnums=0)
def logits(name, model):
    if name in IMAGES:
        return model(jnp.asarray(IMAGES[name]))
    if name == "moe":
        return model(jnp.asarray(TOKENS))[0] @ model.head()
    return model.logits(model(jnp.asarray(TOKENS), None, jnp.asarray(REAL, jnp.int32), jnp.asarray(TYPES)))[REAL]


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, tmp_path):
    """Ours has the logits of transformers, on eight devices; what it saves, ViT after training, has ours there."""
    cfg, hf, name = CASES[case], HF[case], case.partition(",")[0]
    auto, model = theirs(name, cfg)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert hf.read_config(tmp_path / "theirs") == cfg

    program = RECIPES[name](cfg).on(programs.mesh(**MESHES[name]))
    placed = {path: leaf.sharding for path, leaf in _tree.leaves(program.plan.abstract()).items()}
    assert any(not sharding.is_fully_replicated for sharding in placed.values())
    state = program.init() if name == "vit" else {"model": program.plan.abstract()}
    ours = hf.load(tmp_path / "theirs", state["model"])
    assert {path: leaf.sharding for path, leaf in _tree.leaves(ours).items()} == placed
    ours.eval()
    expected = logits_of(name, model)
    np.testing.assert_allclose(logits(name, ours), expected, rtol=0, atol=1e-4)

    if name == "vit":
        label = np.arange(8, dtype=np.int32)
        batch = program.plan.batch({"image": IMAGES["vit"], "label": label, "sample": label})
        state, metrics = program.step(state, batch)  # at a learning rate of 0
        loss = np.mean(np.log(np.exp(expected).sum(1)) - expected[label, label])
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
        state, _ = program.step(state, batch)
        ours = state["model"]
        assert np.abs(np.asarray(logits(name, ours)) - expected).max() > 1e-3  # that was one to learn from

    hf.save(tmp_path / "ours", ours, file_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    back, found = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    absent = {each for each in found.pop("missing_keys") if not each.endswith("num_batches_tracked")}
    assert not absent
    assert not any(found.values()), found
    np.testing.assert_allclose(logits_of(name, back.eval()), logits(name, ours), rtol=0, atol=1e-4)


def filled(name, random):
    """A model without a compilation; variances are positive."""
    make = {"moe": moe.MoE, "bert": bert.Bert, "vit": vit.ViT}.get(name, resnet.ResNet)
    shape = nnx.eval_shape(lambda: make(CASES[name], rngs=nnx.Rngs(0)))
    return _tree.replace(
        shape, {path: random(leaf.shape).astype(leaf.dtype) for path, leaf in _tree.leaves(shape).items()}
    )


EXTRA = {
    "moe": ("model.layers.0.self_attn.rotary_emb.inv_freq",),
    "bert": (
        "bert.pooler.dense.weight", "cls.seq_relationship.bias", "bert.embeddings.position_ids",
        "cls.predictions.decoder.weight", "cls.predictions.decoder.bias",
    ),
    "vit": ("vit.pooler.dense.bias",),
    "resnet": ("resnet.embedder.embedder.normalization.num_batches_tracked",),
}  # fmt: skip
"""What older or larger files have, and these models have no use for."""


@pytest.mark.parametrize("name", EXTRA)
def test_without_transformers(name, tmp_path):
    """What is written is read again as it was; what is of no use is left unread by name, and nothing else is."""
    hf, model = HF[name], filled(name, np.random.default_rng(1).random)
    hf.save(tmp_path / "saved", model, dtype="bfloat16")
    assert hf.read_config(tmp_path / "saved") == CASES[name]
    found = safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors")
    spelt = {"weight": "gamma", "bias": "beta"} if name == "bert" else {}
    older = {re.sub(r"(?<=LayerNorm\.)\w+", lambda end: spelt[end[0]], key): value for key, value in found.items()}
    assert (older.keys() == found.keys()) == (not spelt)
    (tmp_path / "older").mkdir()
    file = tmp_path / "older" / "model.safetensors"
    safetensors.numpy.save_file(older | {extra: np.ones(1) for extra in EXTRA[name]}, file)
    for home in ("saved", "older"):
        back = hf.load(tmp_path / home, filled(name, np.zeros), cast=True)
        for path, leaf in _tree.leaves(back).items():
            rounded = _tree.leaves(model)[path].astype(jnp.bfloat16).astype(np.float32)
            assert (leaf == rounded).all(), path

    safetensors.numpy.save_file(older | {"adapter.weight": np.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"adapter\.weight: \(1,\) float64 in the files, nothing here"):
        hf.load(tmp_path / "older", filled(name, np.zeros), cast=True)


LABELS = {"id2label": {str(index): f"class {index}" for index in range(1000)}}
PUBLISHED = {
    "mistralai/Mixtral-8x7B-v0.1": (
        moe_hf,
        moe_config.MIXTRAL_8X7B,
        {
            "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None, "vocab_size": 32000,
            "tie_word_embeddings": False,
        },
    ),
    "google-bert/bert-base-uncased": (
        bert_hf,
        bert_config.BERT_BASE,
        {
            "model_type": "bert", "hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072,
            "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "num_attention_heads": 12,
            "num_hidden_layers": 12, "position_embedding_type": "absolute", "type_vocab_size": 2, "vocab_size": 30522,
        },
    ),
    "google/vit-base-patch16-224": (
        vit_hf,
        dataclasses.replace(vit_config.VIT_B16, norm_eps=1e-12),  # the paper's own code has 1e-6
        {
            "model_type": "vit", "hidden_act": "gelu", "hidden_size": 768, "image_size": 224, "patch_size": [16, 16],
            "intermediate_size": 3072, "layer_norm_eps": 1e-12, "num_attention_heads": 12, "num_channels": 3,
            "num_hidden_layers": 12, "qkv_bias": True, **LABELS,
        },
    ),
    "microsoft/resnet-50": (
        resnet_hf,
        resnet_config.RESNET50,
        {
            "model_type": "resnet", "depths": [3, 4, 6, 3], "downsample_in_first_stage": False, "embedding_size": 64,
            "hidden_act": "relu", "hidden_sizes": [256, 512, 1024, 2048], "layer_type": "bottleneck",
            "num_channels": 3, **LABELS,
        },
    ),
}  # fmt: skip


def told(said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(said))
    return tmp_path


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_description_is_a_named_size(name, tmp_path):
    hf, cfg, said = PUBLISHED[name]
    assert hf.read_config(told(said, tmp_path)) == cfg


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", {"hidden_act": "gelu"}, "hidden_act: 'gelu', and `models.moe` computes 'silu'"),
        ("mistralai/Mixtral-8x7B-v0.1", {"router_jitter_noise": 0.1}, "router_jitter_noise: 0.1, and"),
        ("google-bert/bert-base-uncased", {"tie_word_embeddings": False}, "tie_word_embeddings: False, and"),
        ("google-bert/bert-base-uncased", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("google/vit-base-patch16-224", {"qkv_bias": False}, "qkv_bias: False, and `models.vit` computes True"),
        ("google/vit-base-patch16-224", {"image_size": [224, 192]}, "and `models.vit` squares"),
        ("microsoft/resnet-50", {"downsample_in_bottleneck": True}, "downsample_in_bottleneck: True, and"),
        ("microsoft/resnet-50", {"hidden_sizes": [64, 128, 256, 512]}, "computes [256, 512, 1024, 2048]"),
        ("microsoft/resnet-50", {"model_type": "regnet"}, "model_type is 'regnet', and `models.resnet` reads 'resnet'"),
    ],
)
def test_what_a_model_does_not_compute_is_refused(name, change, line, tmp_path):
    hf, _, said = PUBLISHED[name]
    with pytest.raises(ValueError) as found:
        hf.read_config(told({**said, **change}, tmp_path))
    assert line in str(found.value)


@pytest.mark.parametrize(
    ("hf", "model", "cfg", "line"),
    [
        (moe_hf, moe.MoE, moe_config.TINY, "num_shared=1, and MixtralForCausalLM has 0"),
        (
            bert_hf,
            bert.Bert,
            dataclasses.replace(bert_config.TINY, norm="before"),
            "norm='before', and BertForMaskedLM",
        ),
        (vit_hf, vit.ViT, dataclasses.replace(vit_config.TINY, norm="after"), "norm='after', and ViTForImageClassif"),
        (resnet_hf, resnet.ResNet, resnet_config.TINY, "stem=False, and ResNetForImageClassification has True"),
    ],
    ids=["moe", "bert", "vit", "resnet"],
)
def test_what_transformers_does_not_compute_is_not_written(hf, model, cfg, line, tmp_path):
    with pytest.raises(ValueError) as found:
        hf.save(tmp_path / "saved", nnx.eval_shape(lambda: model(cfg, rngs=nnx.Rngs(0))))
    assert line in str(found.value)
    assert not (tmp_path / "saved").exists()
