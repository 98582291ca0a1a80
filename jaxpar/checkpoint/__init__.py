"""Sharded, asynchronous, checked checkpoints of any tree, on Orbax: `save`, `restore`, and what a directory holds."""

from ._convert import convert as convert
from ._diff import Difference as Difference, diff as diff
from ._exchange import (
    load_safetensors as load_safetensors,
    save_safetensors as save_safetensors,
    tensors as tensors,
)
from ._keep import Keep as Keep
from ._restore import metadata as metadata, restore as restore
from ._save import Saving as Saving, save as save, save_async as save_async
from ._steps import latest as latest, prune as prune, steps as steps, verify as verify
from ._tensor import Tensor as Tensor
