"""Weights of GPT-2, Llama and Mistral as Hugging Face keeps them: `read_config`, `load`, `save`.

Notable: transformers rotates features i and i + H/2 together, as `rotate` does, so queries and keys keep their order
(Meta's own Llama files pair neighbours, and are not these). Linear layers of Llama are stored transposed; those of
GPT-2 are not, and its queries, keys and values are one matrix. Mistral is Llama with a window.
"""

from jaxpar.checkpoint import Tensor
from models import hf

from .config import Config

IGNORED = (
    "*.attn.bias",  # masks, which old files of GPT-2 hold as tensors
    "*.attn.masked_bias",
    "*.rotary_emb.inv_freq",
    "lm_head.weight",  # a copy of the embedding, where they are tied
)


def layout(cfg: Config) -> hf.Layout:
    """Where each leaf of `GPT(cfg)` lives in files of transformers."""
    if cfg.norm == "layer":
        return _gpt2(cfg)
    found = decoder(cfg)
    for name in ("up", "gate", "down"):
        found |= hf.linear(f"blocks.each.mlp.{name}", f"model.layers.{{}}.mlp.{name}_proj", bias=False)
    return found


def decoder(cfg: Config) -> hf.Layout:
    """The leaves of a Llama but for its MLPs: those of every decoder that transformers made after it."""
    block, ours = "model.layers.{}.", "blocks.each."
    found = {"embed.embedding": Tensor("model.embed_tokens.weight"), "norm.scale": Tensor("model.norm.weight")}
    found[f"{ours}attn_norm.scale"] = Tensor(f"{block}input_layernorm.weight")
    found[f"{ours}mlp_norm.scale"] = Tensor(f"{block}post_attention_layernorm.weight")
    for name in "qkvo":
        found |= hf.linear(f"{ours}attn.{name}", f"{block}self_attn.{name}_proj", bias=False)
    return found | _head(cfg)


def _gpt2(cfg: Config) -> hf.Layout:
    block, ours = "transformer.h.{}.", "blocks.each."
    found = {"embed.embedding": Tensor("transformer.wte.weight"), "positions": Tensor("transformer.wpe.weight")}
    found |= hf.norm(f"{ours}attn_norm", f"{block}ln_1") | hf.norm(f"{ours}mlp_norm", f"{block}ln_2")
    start = 0
    for name, heads in (("q", cfg.num_heads), ("k", cfg.num_kv_heads), ("v", cfg.num_kv_heads)):
        stop = start + heads * cfg.head_dim
        found[f"{ours}attn.{name}.kernel"] = Tensor(f"{block}attn.c_attn.weight", part=(1, start, stop))
        found[f"{ours}attn.{name}.bias"] = Tensor(f"{block}attn.c_attn.bias", part=(0, start, stop))
        start = stop
    for name, theirs in (("attn.o", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):
        found[f"{ours}{name}.kernel"] = Tensor(f"{block}{theirs}.weight")
        found[f"{ours}{name}.bias"] = Tensor(f"{block}{theirs}.bias")
    return found | hf.norm("norm", "transformer.ln_f") | _head(cfg)


def _head(cfg: Config) -> hf.Layout:
    return {} if cfg.tied else hf.linear("lm_head", "lm_head", bias=False)


def _from_gpt2(said: hf.Said) -> tuple[Config, hf.Said]:
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


def from_llama(said: hf.Said) -> tuple[Config, hf.Said]:
    """The shape of a Llama, and what else its `config.json` must say."""
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
        window=said.get("sliding_window"),
    )
    return cfg, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "head_dim": cfg.head_dim}


def _from_mistral(said: hf.Said) -> tuple[Config, hf.Said]:
    return from_llama({"num_key_value_heads": 8, "sliding_window": 4096, **said})  # where transformers' defaults differ


def _describe(cfg: Config) -> hf.Said:
    """`config.json` of this shape."""
    if cfg.norm == "rms":
        if cfg.window is None:
            return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **as_llama(cfg)}
        mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        return {**mistral, "sliding_window": cfg.window, **as_llama(cfg)}
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
        **_shared(cfg),
    }


def as_llama(cfg: Config) -> hf.Said:
    """What `config.json` of a Llama, and of decoders made after it, says of this shape."""
    return {
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
        **_shared(cfg),
    }


def _shared(cfg: Config) -> hf.Said:
    return {"vocab_size": cfg.vocab_size, "tie_word_embeddings": cfg.tied, "bos_token_id": None, "eos_token_id": None}


FORMAT = hf.Format(
    folder="gpt",
    layout=layout,
    ignored=IGNORED,
    kinds={"gpt2": _from_gpt2, "llama": from_llama, "mistral": _from_mistral},
    describe=_describe,
    unsaid=("dropout", "remat", "rope_theta"),  # the last is said wherever positions are rotary
    spellings=((r"^(transformer|model)\.", ""),),  # a decoder without its head, as the published GPT-2 is
)
read_config, load, save = FORMAT.read_config, FORMAT.load, FORMAT.save
