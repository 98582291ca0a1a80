"""Arrays are read in blocks along the chunks of the store, whatever the pieces are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxpar import checkpoint
from jaxpar._errors import CheckpointError
from jaxpar.checkpoint import _blocks, _orbax


@pytest.mark.parametrize(
    ("spans", "grid", "most"),
    [
        (((0, 64), (0, 64)), (8, 16), 4096),
        (((3, 61), (5, 6)), (8, 16), 2048),
        (((0, 7),), (100,), 16),
        (((4, 12), (0, 3), (16, 32)), (4, 1, 8), 256),
        ((), (), 16),
    ],
    ids=str,
)
def test_blocks_fill_a_piece_once(spans, grid, most):
    """Each touches as many bytes as it says: at most so many, or those of one chunk."""
    times = np.zeros([stop for _, stop in spans], int)
    for block, cost in _blocks._blocks(spans, grid, 4, most):
        times[tuple(slice(*span) for span in block)] += 1
        chunks = [-(-stop // size) - start // size for (start, stop), size in zip(block, grid, strict=True)]
        assert cost == 4 * np.prod(chunks) * np.prod(grid)
        assert cost <= most or np.prod(chunks) == 1
    inside = tuple(slice(*span) for span in spans)
    assert np.all(times[inside] == 1)
    assert times.sum() == times[inside].size


def test_what_was_saved_by_rows_is_read_by_columns(tmp_path, monkeypatch):
    """With less room than the array has bytes, in another dtype too, and whole into host memory."""
    monkeypatch.setattr(_orbax, "CHUNK_BYTES", 512)
    monkeypatch.setattr(_blocks, "READ_BYTES", 2048)
    devices = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    on = lambda *spec: NamedSharding(devices, P(*spec))
    values = np.random.default_rng(0).standard_normal((48, 40)).astype(np.float32)
    checkpoint.save(tmp_path, 1, {"w": jax.device_put(values, on("a"))})
    kinds = np.float32, jnp.bfloat16
    for spec, kind in itertools.product(((None, "a"), ("b", "a"), (None, ("a", "b")), ()), kinds):
        like = {"w": jax.ShapeDtypeStruct(values.shape, kind, sharding=on(*spec))}
        read = checkpoint.restore(tmp_path, like, cast=True)["w"]
        assert read.sharding == on(*spec)
        np.testing.assert_array_equal(np.asarray(read), values.astype(kind))
    np.testing.assert_array_equal(checkpoint.restore(tmp_path, {"w": np.zeros_like(values)})["w"], values)


def test_an_array_of_another_shape(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": jnp.ones((8, 4))})
    with pytest.raises(CheckpointError, match=r"^w: \(8, 4\) in the store, \(4, 4\) was asked for"):
        _orbax.read(tmp_path / "1", {"w": np.zeros((4, 4), np.float32)})
