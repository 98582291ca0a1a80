"""Weights of Mixtral as Hugging Face keeps them: `read_config`, `load`, `save`.

Notable: a file has three matrices for each expert of each layer, transposed, which are rows of our three stacks;
attention is as in Llama (`models.gpt.hf`). Mixtral drops no token, as `jp.Dropless()`; a model with `jp.Capacity` may.
The coefficient of the balance loss is taken as it is, but multiplies another number: for an even load 1 here, a mean
over sequences and layers, and there `num_chosen`, over all tokens and layers at once.
"""

from jaxpar.checkpoint import Tensor
from models import hf
from models.gpt import hf as gpt

from .config import Config


def layout(cfg: Config) -> hf.Layout:
    """Where each leaf of `MoE(cfg)` lives in files of transformers."""
    mlp, theirs = "blocks.each.mlp", "model.layers.{}.block_sparse_moe"
    experts = {
        f"{mlp}.experts.{name}": Tensor(f"{theirs}.experts.{{}}.{matrix}.weight", transpose=(1, 0))
        for name, matrix in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
    }
    return gpt.decoder(cfg) | hf.linear(f"{mlp}.router", f"{theirs}.gate", bias=False) | experts


def _from_mixtral(said: hf.Said) -> tuple[Config, hf.Said]:
    said = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, **said}  # other defaults than Llama's
    cfg, expected = gpt.from_llama(said)
    cfg = Config(
        **vars(cfg),
        num_experts=said.get("num_local_experts", 8),
        num_chosen=said.get("num_experts_per_tok", 2),
        balance=said.get("router_aux_loss_coef", 0.001),
        z=0.0,
    )
    return cfg, expected | {"router_jitter_noise": 0.0}


def _describe(cfg: Config) -> hf.Said:
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": cfg.num_experts,
        "num_experts_per_tok": cfg.num_chosen,
        "router_aux_loss_coef": cfg.balance,
        "sliding_window": cfg.window,
        **gpt.as_llama(cfg),
    }


FORMAT = hf.Format(
    folder="moe",
    layout=layout,
    ignored=gpt.IGNORED,
    kinds={"mixtral": _from_mixtral},
    describe=_describe,
    unsaid=("dispatch", "z", "dropout", "remat"),
)
read_config, load, save = FORMAT.read_config, FORMAT.load, FORMAT.save
