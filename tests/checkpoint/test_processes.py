"""Checkpoints of two processes: each hashes what it wrote, both go on from the same step, and neither waits in vain."""

import re
import socket

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar import checkpoint
from tests._peers import peers

PEER = """
    import os, pathlib, resource, sys, time
    import jax, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    import jaxpar as jp
    from jaxpar import checkpoint
    from jaxpar.checkpoint._barrier import Barrier

    index, home = int(sys.argv[1]), pathlib.Path(sys.argv[3])
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, index)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows = lambda fill: jax.make_array_from_callback(
        (8, 4), NamedSharding(mesh, P("data")), lambda at: np.full((8, 4), fill, np.float32)[at]
    )
    for step in (1, 2):
        checkpoint.save(home, step, {"w": rows(step)}, metadata={"step": step})
    if index == 0:  # before it says which step to look at; the file is one that the other process wrote
        file = max((home / "2" / "state" / "ocdbt.process_1").glob("d/*"), key=lambda path: path.stat().st_size)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    found = checkpoint.restore(home, {"w": rows(0)})["w"]
    layers = [{"w": jax.ShapeDtypeStruct((4,), np.float32, sharding=NamedSharding(mesh, P()))}] * 8
    cut = checkpoint.restore(home, layers)  # `w` is a stack of eight
    mine = {float(shard.data.max()) for leaf in [found, cut[7]["w"]] for shard in leaf.addressable_shards}
    print("restored", mine, flush=True)

    # A process whose disk is full tells the others, and one that does not come is named.
    if index == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
    began = time.monotonic()
    try:
        checkpoint.save(home, 3, {"w": rows(3)})
    except jp.CheckpointError as error:
        print("full", time.monotonic() - began < 100, error, flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    barrier = Barrier()
    barrier("first")
    barrier._seconds = 1.5
    if index == 0:
        try:
            barrier("second")
        except jp.CheckpointError as error:
            print("missing", error, flush=True)
    time.sleep(3)  # process 0 has the service that the other asks
    os._exit(0)  # Orbax waits for its own barriers: for 20 minutes
"""


@pytest.mark.multiprocess
def test_two_processes(child_env, tmp_path):
    ended = peers(PEER, 2, tmp_path, env=child_env)
    words = [[line for line in peer.out.splitlines() if not line.startswith("[Gloo]")] for peer in ended]
    assert [lines[:1] for lines in words] == [["restored {1.0}"]] * 2, ended
    first, second = (lines[1:] for lines in words)
    full = r"full True Step 3 could not be saved at .*: {}\[Errno 27\] File too large"
    assert re.match(full.format(""), second[0]), ended
    assert re.match(full.format("process 1 on .*: "), first[0]), ended
    host = socket.gethostname()
    assert first[-1] == (
        f"missing after 2 s process 1 on {host} had not come as far as 'second'. Look there: it is dead, cut off, or "
        "its storage hangs."
    )
    assert "step 2 is DAMAGED, so the latest valid step is 1." in ended[0].err
    # One of the two hashed the file, and said which it was.
    named = ("state/ocdbt.process_1/", "other bytes than were saved")
    assert any(all(word in peer.err for word in named) for peer in ended), ended
    assert checkpoint.verify(tmp_path, 1) == [1]
    sums = checkpoint._sums.read(tmp_path / "1")
    assert {checkpoint._orbax.writer(name) for name in sums} == {0, 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    assert np.asarray(checkpoint.restore(tmp_path, {"w": jnp.zeros((8, 4))}, 1)["w"]).tolist() == [[1.0] * 4] * 8
