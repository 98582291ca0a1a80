"""Four processes of one device each read a model of 256 MiB: none ever holds more than its shard and a constant."""

import pytest

from tests._peers import peers

SHARD = 64  # MiB of each process
CONSTANT = 64  # MiB beside it, at most: `_blocks.READ_BYTES`, an array on its way, what malloc keeps; twice that

PEER = """
    import ctypes, pathlib, re, sys
    import jax, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from jaxpar import checkpoint

    index, home = int(sys.argv[1]), pathlib.Path(sys.argv[3])
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 4, index)
    devices = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    by_rows, by_columns = (NamedSharding(devices, spec) for spec in (P(None, "fsdp"), P(None, None, "fsdp")))
    SHAPE = (8, 1024, 1024)  # 32 MiB: a stack of layers

    def status(name):
        return int(re.search(name + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024

    def grown(read):
        ctypes.CDLL(None).malloc_trim(0)  # what is free is given back, or it would be taken again unseen
        before = status("VmRSS")
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        kept = jax.block_until_ready(read())
        assert len(kept) == 8
        return round(status("VmHWM") - before, 1)

    part = np.ones((8, 256, 1024), np.float32)
    tree = {f"w{each}": jax.make_array_from_process_local_data(by_rows, part, SHAPE) for each in range(8)}
    layout = {name: checkpoint.Tensor(name + ".{}", transpose=(1, 0)) for name in tree}
    small = {"w": tree["w0"][:1]}
    checkpoint.save(home / "small", 1, small)
    checkpoint.save(home / "native", 1, tree)
    checkpoint.save_safetensors(home / "other", tree, layout, file_bytes=100_000_000)
    del tree
    like = lambda names, shape: {name: jax.ShapeDtypeStruct(shape, np.float32, sharding=by_columns) for name in names}
    checkpoint.restore(home / "small", like(["w"], (1, 1024, 1024)))  # threads and modules are there from now on
    wanted = like(layout, SHAPE)
    print(grown(lambda: checkpoint.restore(home / "native", wanted)),
          grown(lambda: checkpoint.load_safetensors(home / "other", wanted, layout)), flush=True)
"""


@pytest.mark.multiprocess
def test_peak_of_a_restore(child_env, tmp_path):
    """By columns of what was saved by rows, so that every process reads from what all of them wrote."""
    ended = peers(PEER, 4, tmp_path, env=child_env, seconds=280)
    assert [peer.code for peer in ended] == [0] * 4, ended
    for peer in ended:
        native, other = map(float, peer.last.split())
        assert SHARD * 0.9 < native < SHARD + CONSTANT, peer.out
        assert SHARD * 0.5 < other < SHARD + CONSTANT, peer.out  # some of what the first freed may be taken again
