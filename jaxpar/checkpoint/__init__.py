"""Sharded, asynchronous checkpoints of any tree, on Orbax: `save`, `restore`, and what a directory holds."""

from ._checkpoint import (
    Saving as Saving,
    metadata as metadata,
    restore as restore,
    save as save,
    save_async as save_async,
)
from ._steps import latest as latest, prune as prune, steps as steps
