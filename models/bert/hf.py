"""Weights of BERT as Hugging Face keeps them, those of `BertForMaskedLM`: `read_config`, `load`, `save`.

Notable: Google's own files call the scale and bias of a norm `gamma` and `beta`, later ones `weight` and `bias`: both
are read, and the latter written. Which token is the mask, a `config.json` says only if `save` wrote it; 103 is that of
Google's vocabularies. Padding, which transformers masks, is a segment of its own here.
"""

from jaxpar.checkpoint import Tensor
from models import hf

from .config import Config

IGNORED = (
    "bert.pooler.dense.*",  # of the first token, for tasks about whole sequences
    "cls.seq_relationship.*",  # whether the second sentence follows the first
    "bert.embeddings.position_ids",  # 0, 1, 2, ...
    "cls.predictions.decoder.*",  # copies of the embedding and of the bias, to which they are tied
)


def layout(cfg: Config) -> hf.Layout:  # noqa: ARG001  # every shape has the same names
    """Where each leaf of `Bert(cfg)` lives in files of transformers."""
    ours, block, head = "blocks.each.", "bert.encoder.layer.{}.", "cls.predictions."
    found = {
        name: Tensor(f"bert.embeddings.{theirs}_embeddings.weight")
        for name, theirs in (("embed.embedding", "word"), ("positions", "position"), ("types", "token_type"))
    }
    found |= hf.norm("embed_norm", "bert.embeddings.LayerNorm") | hf.encoder(block, attention="attention.self")
    found |= hf.norm(f"{ours}attn_norm", f"{block}attention.output.LayerNorm")
    found |= hf.norm(f"{ours}mlp_norm", f"{block}output.LayerNorm")
    found |= hf.linear("transform", f"{head}transform.dense")
    found |= hf.norm("transform_norm", f"{head}transform.LayerNorm")
    return found | {"bias": Tensor(f"{head}bias")}


def _from_bert(said: hf.Said) -> tuple[Config, hf.Said]:
    cfg = Config(
        vocab_size=said["vocab_size"],
        mask=said.get("mask_token_id", 103),
        max_positions=said["max_position_embeddings"],
        num_types=said.get("type_vocab_size", 2),
        **hf.encoder_from(said),
        norm="after",
    )
    return cfg, {
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        "is_decoder": False,
        "add_cross_attention": False,
    }


def _describe(cfg: Config) -> hf.Said:
    return {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "vocab_size": cfg.vocab_size,
        "mask_token_id": cfg.mask,
        "max_position_embeddings": cfg.max_positions,
        "type_vocab_size": cfg.num_types,
        **hf.encoder_to(cfg),
        "tie_word_embeddings": True,
    }


FORMAT = hf.Format(
    folder="bert",
    layout=layout,
    ignored=IGNORED,
    kinds={"bert": _from_bert},
    describe=_describe,
    unsaid=("guessed", "remat"),
    spellings=((r"LayerNorm\.weight$", "LayerNorm.gamma"), (r"LayerNorm\.bias$", "LayerNorm.beta")),
)
read_config, load, save = FORMAT.read_config, FORMAT.load, FORMAT.save
