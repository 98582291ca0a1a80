"""One device's copy of an array is corrupted, for real: it is found, and the device is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxpar.run._replicas import odd_ones, told


def make_mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def corrupted(leaf, device, bit=1):
    """`leaf` with one bit flipped in the copy that `device` holds."""
    pieces = []
    for shard in leaf.addressable_shards:
        data = np.array(shard.data)
        if shard.device == device:
            data.reshape(-1)[-1:].view(np.uint8)[0] ^= bit
        pieces.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, pieces)


def state(mesh):
    put = lambda value, *spec: jax.device_put(value, NamedSharding(mesh, P(*spec)))
    random = np.random.default_rng(0)
    return {
        "w": put(random.normal(size=(8, 12)).astype(np.float32), "fsdp"),
        "b": put(random.normal(size=(5,)).astype(jnp.bfloat16)),
        "step": put(np.int32(7)),
        "mask": put(np.array([True, False, True])),
        "small": put(np.arange(6).astype(jnp.int4)),
        "whole": put(np.arange(8, dtype=np.float32), ("data", "fsdp")),  # every device its own
        "host": np.ones(3),
    }


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=4, fsdp=2)


def test_equal_copies(mesh):
    assert odd_ones(state(mesh)) == []


@pytest.mark.parametrize("path", ["w", "b", "step", "mask"])
@pytest.mark.parametrize("device", [0, 5])
def test_one_flipped_bit_names_the_array_and_the_device(path, device, mesh):
    tree = state(mesh)
    device = mesh.devices.flat[device]
    tree[path] = corrupted(tree[path], device)
    (found,) = odd_ones(tree)
    copies = {"w": 4}.get(path, 8)
    assert (found.path, found.devices, found.num_copies) == (path, (device,), copies)
    assert told([found]) == f"{path} on {device} of process 0 is not what the other {copies - 1} hold"


def test_of_two_copies_both_are_named():
    mesh = make_mesh(data=2, fsdp=4)
    tree = {"w": jax.device_put(np.ones((8, 2), np.float32), NamedSharding(mesh, P("fsdp")))}
    tree["w"] = corrupted(tree["w"], mesh.devices[1, 2])
    (found,) = odd_ones(tree)
    assert found.devices == (mesh.devices[0, 2], mesh.devices[1, 2])
    assert told([found]).startswith("w differs between ")


def test_swapped_values_are_seen(mesh):
    """A sum alone would not see them."""
    leaf = jax.device_put(np.arange(4, dtype=np.float32), NamedSharding(mesh, P()))
    pieces = [jax.device_put(np.array(shard.data), shard.device) for shard in leaf.addressable_shards]
    pieces[3] = jax.device_put(np.array([0, 2, 1, 3], np.float32), pieces[3].device)
    leaf = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, pieces)
    assert [odd.devices for odd in odd_ones({"w": leaf})] == [(leaf.addressable_shards[3].device,)]
