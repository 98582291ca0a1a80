"""Type names shared by the whole package."""

from collections.abc import Callable
from typing import Any

from jax.sharding import AbstractMesh, Mesh

PyTree = Any
"""Anything `jax.tree` can walk, or an nnx graph node."""

AnyMesh = Mesh | AbstractMesh
"""A mesh of devices that are here, or of hardware that is not."""

Axes = tuple[str, ...]
"""Mesh axes, in the order in which they split a dim; `()` means whole."""

Factory = Callable[[], PyTree]
"""Makes a model, or any pytree of parameters, when called; it is traced, so it costs no memory."""
