"""Weights of GPT-2 and Llama as Hugging Face keeps them: `read_config`, `load`, `save`.

Notable: transformers rotates features i and i + H/2 together, as `rotate` does, so queries and keys keep their order
(Meta's own Llama files pair neighbours, and are not these). Linear layers of Llama are stored transposed; those of
GPT-2 are not, and its queries, keys and values are one matrix.
"""

import json
import os
import pathlib
from typing import Any

import jaxpar as jp
from jaxpar.checkpoint import Tensor

from .config import Config
from .model import GPT

IGNORED = (
    "*.attn.bias",  # masks, which old files of GPT-2 hold as tensors
    "*.attn.masked_bias",
    "*.rotary_emb.inv_freq",
)


def layout(cfg: Config, *, prefix: str | None = None) -> dict[str, Tensor]:
    """Where each leaf of `GPT(cfg)` lives in files of transformers.

    Args:
        cfg: The shape.
        prefix: Before all names but the head's; what `save_pretrained` writes if not given.
    """
    if cfg.norm == "layer":
        return _gpt2(cfg, "transformer." if prefix is None else prefix)
    return _llama(cfg, "model." if prefix is None else prefix)


def load(directory: str | os.PathLike[str], model: GPT, *, cast: bool = False) -> GPT:
    """Read the weights in `directory` into `model`, onto its shardings, and return it.

    Args:
        directory: What `save_pretrained` wrote, or a hub's snapshot.
        model: Sharded as a plan has it, or abstract with shardings.
        cast: Round to the dtypes of `model`.

    Example:
        >>> cfg = read_config("gpt2")  # doctest: +SKIP
        >>> program = recipe(cfg, batch=8).on(jp.mesh(fsdp=-1))  # doctest: +SKIP
        >>> state = program.init()  # doctest: +SKIP
        >>> model = load("gpt2", state["model"])  # doctest: +SKIP
    """
    home = pathlib.Path(directory)
    prefix = "" if _is_bare(home, model.cfg) else None
    head = ("lm_head.weight",) if model.cfg.tied else ()  # a copy of the embedding
    return jp.checkpoint.load_safetensors(
        home, model, layout(model.cfg, prefix=prefix), ignore=(*IGNORED, *head), cast=cast
    )


def save(
    directory: str | os.PathLike[str], model: GPT, *, dtype: str | None = None, file_bytes: int = 5_000_000_000
) -> None:
    """Write `model` so that `transformers.AutoModelForCausalLM.from_pretrained(directory)` reads it.

    Args:
        directory: Must not exist.
        model: Sharded or not.
        dtype: Of all weights: `"bfloat16"`; as they are if `None`.
        file_bytes: The most that one file holds.
    """
    cfg = model.cfg
    kind = dtype or str(model.embed.embedding[...].dtype)
    jp.checkpoint.save_safetensors(
        directory, model, layout(cfg), dtype=dtype, file_bytes=file_bytes,
        beside={"config.json": {**_to_json(cfg), "dtype": kind, "torch_dtype": kind}},
    )  # fmt: skip


def read_config(directory: str | os.PathLike[str]) -> Config:
    """The shape that `config.json` describes.

    Raises:
        ValueError: Naming everything that `GPT` does not compute as the file says.
    """
    path = pathlib.Path(directory) / "config.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    kind = said.get("model_type")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{path}: model_type is {kind!r}, and `models.gpt` reads 'gpt2' and 'llama'.")
    cfg, expected = (_from_gpt2 if kind == "gpt2" else _from_llama)(said)
    lines = [
        f"{name}: {said[name]!r}, and `models.gpt` computes {value!r}"
        for name, value in expected.items()
        if name in said and said[name] != value
    ]
    if lines:
        raise ValueError("\n".join([f"{path} is another model than `models.gpt`.", *lines, "Use a model of its own."]))
    return cfg


def _gpt2(cfg: Config, prefix: str) -> dict[str, Tensor]:
    block, ours = f"{prefix}h.{{}}.", "blocks.each."
    found = {"embed.embedding": Tensor(f"{prefix}wte.weight"), "positions": Tensor(f"{prefix}wpe.weight")}
    for norm, theirs in (("attn_norm", "ln_1"), ("mlp_norm", "ln_2")):
        found[f"{ours}{norm}.scale"] = Tensor(f"{block}{theirs}.weight")
        found[f"{ours}{norm}.bias"] = Tensor(f"{block}{theirs}.bias")
    start = 0
    for name, heads in (("q", cfg.num_heads), ("k", cfg.num_kv_heads), ("v", cfg.num_kv_heads)):
        stop = start + heads * cfg.head_dim
        found[f"{ours}attn.{name}.kernel"] = Tensor(f"{block}attn.c_attn.weight", part=(1, start, stop))
        found[f"{ours}attn.{name}.bias"] = Tensor(f"{block}attn.c_attn.bias", part=(0, start, stop))
        start = stop
    for name, theirs in (("attn.o", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):
        found[f"{ours}{name}.kernel"] = Tensor(f"{block}{theirs}.weight")
        found[f"{ours}{name}.bias"] = Tensor(f"{block}{theirs}.bias")
    found |= {"norm.scale": Tensor(f"{prefix}ln_f.weight"), "norm.bias": Tensor(f"{prefix}ln_f.bias")}
    return found | _head(cfg)


def _llama(cfg: Config, prefix: str) -> dict[str, Tensor]:
    block, ours = f"{prefix}layers.{{}}.", "blocks.each."
    names = {
        "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
        "attn.o": "self_attn.o_proj", "mlp.up": "mlp.up_proj", "mlp.gate": "mlp.gate_proj", "mlp.down": "mlp.down_proj",
    }  # fmt: skip
    found = {"embed.embedding": Tensor(f"{prefix}embed_tokens.weight"), "norm.scale": Tensor(f"{prefix}norm.weight")}
    found[f"{ours}attn_norm.scale"] = Tensor(f"{block}input_layernorm.weight")
    found[f"{ours}mlp_norm.scale"] = Tensor(f"{block}post_attention_layernorm.weight")
    for name, theirs in names.items():
        found[f"{ours}{name}.kernel"] = Tensor(f"{block}{theirs}.weight", transpose=(1, 0))
    return found | _head(cfg)


def _head(cfg: Config) -> dict[str, Tensor]:
    return {} if cfg.tied else {"lm_head.kernel": Tensor("lm_head.weight", transpose=(1, 0))}


def _is_bare(home: pathlib.Path, cfg: Config) -> bool:
    """Whether files name the decoder's tensors without a prefix, as the published GPT-2 does."""
    first = next(iter(layout(cfg, prefix="").values())).name
    return first in jp.checkpoint.tensors(home)


def _from_gpt2(said: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    cfg = Config(
        vocab_size=said["vocab_size"],
        max_positions=said["n_positions"],
        embed_dim=said["n_embd"],
        num_layers=said["n_layer"],
        num_heads=said["n_head"],
        num_kv_heads=said["n_head"],
        mlp_dim=said.get("n_inner") or 4 * said["n_embd"],
        positions="learned",
        norm="layer",
        mlp="gelu",
        tied=said.get("tie_word_embeddings", True),
        bias=True,
        norm_eps=said.get("layer_norm_epsilon", 1e-5),
    )
    return cfg, {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }


def _from_llama(said: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(
            f"config.json scales rotary positions ({rope}), and `models.gpt` does not: other numbers would come out."
        )
    cfg = Config(
        vocab_size=said["vocab_size"],
        max_positions=said["max_position_embeddings"],
        embed_dim=said["hidden_size"],
        num_layers=said["num_hidden_layers"],
        num_heads=said["num_attention_heads"],
        num_kv_heads=said.get("num_key_value_heads") or said["num_attention_heads"],
        mlp_dim=said["intermediate_size"],
        positions="rotary",
        norm="rms",
        mlp="silu",
        tied=said.get("tie_word_embeddings", False),
        bias=False,
        norm_eps=said.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", said.get("rope_theta", 10_000.0))),
    )
    return cfg, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "head_dim": cfg.head_dim}


def _to_json(cfg: Config) -> dict[str, Any]:
    """`config.json` of this shape."""
    shared = {"vocab_size": cfg.vocab_size, "tie_word_embeddings": cfg.tied, "bos_token_id": None, "eos_token_id": None}
    if (cfg.positions, cfg.norm, cfg.mlp, cfg.bias) == ("learned", "layer", "gelu", True):
        if cfg.num_kv_heads != cfg.num_heads:
            raise ValueError(
                f"num_kv_heads={cfg.num_kv_heads} of num_heads={cfg.num_heads}: GPT-2 of transformers shares no heads."
            )
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_positions": cfg.max_positions,
            "n_embd": cfg.embed_dim,
            "n_layer": cfg.num_layers,
            "n_head": cfg.num_heads,
            "n_inner": cfg.mlp_dim,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": cfg.norm_eps,
            **shared,
        }
    if (cfg.positions, cfg.norm, cfg.mlp, cfg.bias) == ("rotary", "rms", "silu", False):
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": cfg.max_positions,
            "hidden_size": cfg.embed_dim,
            "num_hidden_layers": cfg.num_layers,
            "num_attention_heads": cfg.num_heads,
            "num_key_value_heads": cfg.num_kv_heads,
            "head_dim": cfg.head_dim,
            "intermediate_size": cfg.mlp_dim,
            "hidden_act": "silu",
            "rms_norm_eps": cfg.norm_eps,
            "rope_theta": cfg.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
            **shared,
        }
    raise ValueError(
        f"positions={cfg.positions!r}, norm={cfg.norm!r}, mlp={cfg.mlp!r}, bias={cfg.bias} are neither GPT-2 nor "
        "Llama, so transformers has no model for these weights."
    )
