"""Two real processes: each reads the rows that its devices hold, also where both hold the same ones."""

import json

import pytest

from tests._peers import peers

CHILD = """
import json, sys

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

index, port, axes = int(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)

import jaxpar as jp
from jaxpar.data import Loader
from tests._peers import peers

class Rows:
    read = []

    def __len__(self):
        return 64

    def __getitem__(self, index):
        self.read.append(index)
        return {"x": np.array([index, index], np.int32)}

strategies = {"data": jp.DP(), "fsdp": jp.FSDP(), "tensor": jp.TP(column=("w",))}
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), axes, axis_types=(AxisType.Auto,) * 2)
plan = jp.plan(lambda: {"w": np.ones((64, 64), np.float32)}, mesh, [strategies[axis] for axis in axes])
whole = Loader(Rows(), batch_size=8, seed=4, process_index=0, process_count=1)
loader = Loader(Rows(), batch_size=8, seed=4)
Rows.read.clear()
with loader.to(plan) as batches:
    batch = next(batches)
    read = Rows.read[:]
held = {name: [(shard.index[0].indices(8)[:2], np.asarray(shard.data).tolist()) for shard in field.addressable_shards]
        for name, field in batch.items()}
for name, field in whole.batch(0).items():
    for (start, stop), rows in held[name]:
        assert rows == field[start:stop].tolist(), (name, start, stop)
print(json.dumps({"shape": batch["x"].shape, "whole": whole.batch(0)["x"][:, 0].tolist(), "read": read}))
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("axes", "parts"),
    [("data,fsdp", (slice(0, 4), slice(4, 8))), ("tensor,fsdp", (slice(0, 8), slice(0, 8)))],
    ids=["own rows", "shared rows"],
)
def test_two_processes(axes, parts, child_env):
    """A tensor axis across processes lets both hold all rows, and both read all; else each reads its half."""
    ended = peers(CHILD, 2, axes, env=child_env, devices=2)
    assert [peer.code for peer in ended] == [0, 0], ended
    for peer, part in zip(ended, parts, strict=True):
        found = json.loads(peer.last)
        assert found["shape"] == [8, 2]
        mine = found["whole"][part]
        assert found["read"][: len(mine)] == mine
        assert not set(found["read"][: len(mine) * 3]) & (set(found["whole"]) - set(mine))
