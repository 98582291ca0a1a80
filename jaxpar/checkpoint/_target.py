"""Where one array goes: what is asked of the store for it, and how that becomes a leaf like the one given."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding

from .._context import axes_at
from .._errors import CheckpointError, listed
from ._parts import is_key

Asked = jax.ShapeDtypeStruct | np.ndarray
"""What to read: onto a sharding, or into host memory."""


class Target:
    """Where one array goes.

    Attributes:
        asked: What to ask of the store.
        is_stored: Whether the store has it: Orbax refuses arrays without elements.
        released: The leaf without its array: shape, dtype and sharding.
    """

    def __init__(self, leaf: Any) -> None:
        self.is_stored = leaf.size > 0
        self._sharding = getattr(leaf, "sharding", None)
        if isinstance(leaf, jax.ShapeDtypeStruct) and self._sharding is None and jax.device_count() == 1:
            self._sharding = SingleDeviceSharding(jax.devices()[0])
        self.is_placed = self._sharding is not None or isinstance(leaf, np.ndarray | np.generic)
        # An array that was never placed must not become one that is tied to device 0: a step whose other arguments
        # live on a mesh takes the former and refuses the latter.
        self._is_free = isinstance(leaf, jax.Array) and not leaf.committed
        self._is_scalar = isinstance(leaf, np.generic)
        self.released = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._sharding)
        self._key_impl = _key_impl(leaf) if is_key(leaf) else None
        stored = jax.eval_shape(jax.random.key_data, leaf) if self._key_impl else leaf
        on_host = self._is_free or self._sharding is None
        self.asked: Asked = (
            np.empty(stored.shape, stored.dtype)
            if on_host
            else jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=self._sharding)
        )

    def placed(self, value: Any) -> Any:
        """The leaf, from what was read."""
        if not self.is_stored:
            value = self.asked if isinstance(self.asked, np.ndarray) else jnp.zeros(self.asked.shape, self.asked.dtype)
        if self._is_free:
            value = jnp.asarray(value)
        if self._key_impl:
            value = jax.random.wrap_key_data(value, impl=self._key_impl)
        if self._sharding is not None and not self._is_free and value.sharding != self._sharding:
            value = jax.device_put(value, self._sharding)
        return value[()] if self._is_scalar else value


def check_placed(targets: dict[str, Target]) -> None:
    """Raise for shapes that do not say where they go."""
    lines = [f"{path}: no sharding" for path, target in targets.items() if not target.is_placed]
    if lines:
        raise CheckpointError(
            f"{listed(lines)}\nOn {jax.device_count()} devices a jax.ShapeDtypeStruct must say where it goes. "
            "Give it one: jax.ShapeDtypeStruct(shape, dtype, sharding=...)."
        )


def layer_of(stack: Asked) -> Asked:
    """What to ask for one layer of a stack, so that it lies as that layer does in the stack."""
    if isinstance(stack, np.ndarray):
        return np.empty(stack.shape[1:], stack.dtype)
    sharding = stack.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, P(*sharding.spec[1:]), memory_kind=sharding.memory_kind)
    return jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=_known(sharding))


def stack_of(num: int, layer: Asked) -> Asked:
    """What to ask for a stack, so that each of its layers lies as `layer` does."""
    if isinstance(layer, np.ndarray):
        return np.empty((num, *layer.shape), layer.dtype)
    sharding = layer.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, P(None, *sharding.spec), memory_kind=sharding.memory_kind)
    return jax.ShapeDtypeStruct((num, *layer.shape), layer.dtype, sharding=_known(sharding))


def regrouped(stack: Asked, dims: int, lead: tuple[int, ...]) -> Asked:
    """What to ask for a stack whose first `dims` dims count its layers, where these are `lead` in the store.

    Its other dims lie as they do in the stack, and so do its layers if the last of `lead` can be split like them.
    """
    shape = (*lead, *stack.shape[dims:])
    if isinstance(stack, np.ndarray):
        return np.empty(shape, stack.dtype)
    sharding = stack.sharding
    if isinstance(sharding, NamedSharding):
        entries = [*sharding.spec, *[None] * len(stack.shape)][: len(stack.shape)]
        axes = tuple(axis for entry in entries[:dims] for axis in axes_at(entry))
        fits = lead[-1] % math.prod(sharding.mesh.shape[axis] for axis in axes) == 0
        first = [None] * (len(lead) - 1) + [axes if fits and axes else None]
        spec = P(*first, *entries[dims:])
        sharding = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return jax.ShapeDtypeStruct(shape, stack.dtype, sharding=_known(sharding))


def as_asked(value: Any, asked: Asked) -> Any:
    """`value`, read with its layers grouped otherwise, as it was asked for."""
    if isinstance(asked, np.ndarray):
        return np.reshape(value, asked.shape)
    return jax.jit(lambda x: x.reshape(asked.shape), out_shardings=asked.sharding)(value)


def _known(sharding: Any) -> Any:
    if isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
        return sharding
    raise CheckpointError(
        f"a {type(sharding).__name__} does not say where one layer of a stack lies. Place the leaf by a "
        "jax.sharding.NamedSharding."
    )


def _key_impl(key: Any) -> Any:
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), key)
    return found[0]
