"""What the models' `hf.py` share: a `Format`, which reads, checks and writes, and the usual lines of a layout.

Notable: nothing is silent either way. A `config.json` that asks for what a model does not compute is refused; tensors
are left unread by name alone; and a shape is written only if reading its `config.json` gives it again, so that
transformers computes no other model. Dropout, initial values and special tokens are no shape: they are not read.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import jax
from flax import nnx

import jaxpar as jp
from jaxpar.checkpoint import Tensor

Said = dict[str, Any]
"""What a `config.json` says."""

Layout = dict[str, Tensor]
"""Where each leaf lives in files of transformers."""


@runtime_checkable
class Model(Protocol):
    """A model that knows its shape."""

    cfg: Any


C = TypeVar("C")
M = TypeVar("M", bound=Model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format(Generic[C]):
    """How transformers keeps the models of one folder.

    Attributes:
        folder: Of the model, for messages.
        layout: Of a shape, with the names that transformers writes.
        ignored: Patterns of names of tensors that are left unread if the model has no use for them.
        kinds: By `model_type`: the shape that a `config.json` describes, and what else it must say, where it says
            anything about it.
        describe: The `config.json` of a shape.
        unsaid: Fields of a shape that are about training, for which `config.json` has no word.
        spellings: Patterns in names of tensors, and what other files have in their place.
    """

    folder: str
    layout: Callable[[C], Layout]
    ignored: tuple[str, ...]
    kinds: Mapping[str, Callable[[Said], tuple[C, Said]]]
    describe: Callable[[C], Said]
    unsaid: tuple[str, ...]
    spellings: tuple[tuple[str, str], ...] = ()

    def read_config(self, directory: str | os.PathLike[str]) -> C:
        """The shape that `config.json` describes.

        Args:
            directory: What `save_pretrained` wrote, or a hub's snapshot.
        Raises:
            ValueError: Naming everything that the model does not compute as the file says.
        """
        path = pathlib.Path(directory) / "config.json"
        said = json.loads(path.read_text(encoding="utf-8"))
        kind = said.get("model_type")
        if kind not in self.kinds:
            known = " and ".join(", ".join(map(repr, self.kinds)).rsplit(", ", 1))
            raise ValueError(f"{path}: model_type is {kind!r}, and `models.{self.folder}` reads {known}.")
        cfg, expected = self.kinds[kind](said)
        lines = [
            f"{name}: {said[name]!r}, and `models.{self.folder}` computes {value!r}"
            for name, value in expected.items()
            if said.get(name) is not None and said[name] != value  # null is the default
        ]
        if lines:
            first = f"{path} is another model than `models.{self.folder}`."
            raise ValueError("\n".join([first, *lines, "Use a model of its own."]))
        return cfg

    def load(self, directory: str | os.PathLike[str], model: M, *, cast: bool = False) -> M:
        """Read the weights in `directory` into `model`, onto its shardings, and return it.

        Args:
            directory: What `save_pretrained` wrote, or a hub's snapshot.
            model: Sharded as a plan has it, or abstract with shardings (`plan.abstract()`).
            cast: Round to the dtypes of `model`.
        Raises:
            CheckpointError: Naming all tensors that are missing, or unknown and not among those left unread.

        Example:
            >>> from models.gpt import hf, recipe  # doctest: +SKIP
            >>> program = recipe(hf.read_config("gpt2"), batch=8).on(jp.mesh(fsdp=-1))  # doctest: +SKIP
            >>> model = hf.load("gpt2", program.plan.abstract())  # doctest: +SKIP
        """
        home = pathlib.Path(directory)
        names = jp.checkpoint.tensors(home)
        layout = {path: self._spelt(tensor, names) for path, tensor in self.layout(model.cfg).items()}
        return jp.checkpoint.load_safetensors(home, model, layout, ignore=self.ignored, cast=cast)

    def save(
        self,
        directory: str | os.PathLike[str],
        model: Model,
        *,
        dtype: str | None = None,
        file_bytes: int = 5_000_000_000,
    ) -> None:
        """Write `model` so that `from_pretrained(directory)` of transformers reads it.

        Args:
            directory: Must not exist.
            model: Sharded or not.
            dtype: Of all weights: `"bfloat16"`; as they are if `None`.
            file_bytes: The most that one file holds.
        Raises:
            ValueError: Transformers has no model of this shape: what it would compute otherwise is named.
        """
        said = self._described(model.cfg)
        kind = dtype or str(jax.tree.leaves(nnx.state(model, nnx.Param))[0].dtype)
        jp.checkpoint.save_safetensors(
            directory, model, self.layout(model.cfg), dtype=dtype, file_bytes=file_bytes,
            beside={"config.json": {**said, "dtype": kind, "torch_dtype": kind}},
        )  # fmt: skip

    def _spelt(self, tensor: Tensor, names: Collection[str]) -> Tensor:
        """`tensor` by the name that it has in files with these names; by its usual one if it is not there."""
        others = (re.sub(pattern, other, tensor.name) for pattern, other in self.spellings)
        spelt = (dataclasses.replace(tensor, name=name) for name in (tensor.name, *others))
        return next((each for each in spelt if each.named([0] * each.num_indices) in names), tensor)

    def _described(self, cfg: Any) -> Said:
        """`config.json` of `cfg`, if reading it gives `cfg` again."""
        said = self.describe(cfg)
        back, _ = self.kinds[said["model_type"]](said)
        (architecture,) = said["architectures"]
        names = [field.name for field in dataclasses.fields(cfg) if field.name not in self.unsaid]
        lines = [
            f"{name}={getattr(cfg, name)!r}, and {architecture} has {getattr(back, name)!r}"
            for name in names
            if getattr(cfg, name) != getattr(back, name)
        ]
        if lines:
            way_out = "Change these, or write the weights for a model of yours: jp.checkpoint.save_safetensors."
            raise ValueError("\n".join(["transformers has no model of this shape.", *lines, way_out]))
        return said


def linear(ours: str, theirs: str, *, bias: bool = True) -> Layout:
    """A matrix, which torch keeps transposed, and its bias."""
    found = {f"{ours}.kernel": Tensor(f"{theirs}.weight", transpose=(1, 0))}
    return found | {f"{ours}.bias": Tensor(f"{theirs}.bias")} if bias else found


def norm(ours: str, theirs: str, *, scale: str = "weight", bias: str = "bias") -> Layout:
    """The scale and the bias of a norm."""
    return {f"{ours}.scale": Tensor(f"{theirs}.{scale}"), f"{ours}.bias": Tensor(f"{theirs}.{bias}")}


def convolution(ours: str, theirs: str) -> Layout:
    """A kernel, which torch keeps as [out, in, rows, columns]."""
    return {f"{ours}.kernel": Tensor(f"{theirs}.weight", transpose=(2, 3, 1, 0))}


def encoder(theirs: str, *, attention: str) -> Layout:
    """The matrices of `models.encoder`'s blocks.

    Args:
        theirs: Before the names of a block.
        attention: Before those of queries, keys and values.
    """
    names = {
        "q": f"{attention}.query", "k": f"{attention}.key", "v": f"{attention}.value",
        "o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense",
    }  # fmt: skip
    lines = (linear(f"blocks.each.{ours}", f"{theirs}{name}") for ours, name in names.items())
    return {path: tensor for line in lines for path, tensor in line.items()}


def encoder_from(said: Said) -> dict[str, Any]:
    """The fields of `models.encoder.EncoderConfig` but for `norm`."""
    return {
        "embed_dim": said["hidden_size"],
        "num_layers": said["num_hidden_layers"],
        "num_heads": said["num_attention_heads"],
        "mlp_dim": said["intermediate_size"],
        "norm_eps": said.get("layer_norm_eps", 1e-12),
    }


def encoder_to(cfg: Any) -> Said:
    """What `config.json` says of these fields."""
    return {
        "hidden_size": cfg.embed_dim,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "intermediate_size": cfg.mlp_dim,
        "layer_norm_eps": cfg.norm_eps,
        "hidden_act": "gelu",
    }


def classes_from(said: Said) -> int:
    """How many classes a `config.json` names; transformers has two where it says nothing."""
    return len(said["id2label"]) if said.get("id2label") else said.get("num_labels", 2)


def classes_to(num: int) -> Said:
    """So many classes, by number: a `config.json` says how many there are by naming them."""
    names = [f"LABEL_{index}" for index in range(num)]
    return {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }
