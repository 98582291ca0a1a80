"""A smaller program of the same kind: a model with fewer equal layers, a batch of fewer rows.

What is dropped is never made. A stack that is cut after it was made would cost more than the whole one: XLA makes all
of it first (64 layers of 1 MiB, of which one is kept: 134% of the memory of keeping all, on CPU).
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from . import _birth, _tree
from ._errors import StepError
from ._types import Factory, PyTree


@dataclasses.dataclass(frozen=True)
class FewerLayers:
    """A factory whose stacks (`jp.Stack`) and lists of blocks (`FSDP(blocks=...)`) have at most `layers` layers.

    Attributes:
        factory: Makes the whole model.
        layers: How many are left.
        blocks: Patterns of lists of blocks.
    """

    factory: Factory
    layers: int
    blocks: tuple[str, ...]

    def __call__(self) -> PyTree:
        from ._stack import limited

        with limited(self.layers) as limit:
            tree = self.factory()
        before = list(limit.asked)
        if _tree.is_graph(tree):
            for pattern in self.blocks:
                for blocks in _birth.block_lists(tree, pattern).values():
                    before.append(len(blocks))
                    while len(blocks) > self.layers:
                        blocks.pop()
        if max(before, default=0) <= self.layers:
            raise StepError(
                f"recipe.reduced(layers={self.layers}): "
                + (
                    f"the model has {max(before)} already. Leave layers out, or give fewer."
                    if before
                    else "nothing says which layers of this model are equal: it has no jp.Stack, and no "
                    "FSDP(blocks=...) names a list of blocks. Build a smaller one: dataclasses.replace(recipe, "
                    "model=lambda: Model(...))."
                )
            )
        return tree


def fewer_rows(batch: PyTree, rows: int) -> PyTree:
    """The first `rows` rows of `batch`, arrays or shapes; scalars stay."""

    def one(leaf: Any) -> Any:
        if np.ndim(leaf) == 0:
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)
        return leaf[:rows]

    return jax.tree.map(one, batch)
