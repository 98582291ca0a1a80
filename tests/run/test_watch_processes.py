"""Two real processes: they go back together, the slow one is named, and a hang is told with the stacks of both."""

import pytest

from jaxpar.run import read
from tests._peers import peers

PEER = """
    import math, sys, time
    import jax, jax.numpy as jnp, numpy as np
    from flax import nnx
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    import jaxpar as jp
    from jaxpar.run import Hang, Loss, Run, Slow

    index, home = int(sys.argv[1]), sys.argv[3]
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, index)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows = jax.make_array_from_callback((2,), NamedSharding(mesh, P("data")), lambda at: np.ones(2, np.float32)[at])

    class Model(nnx.Module):
        def __init__(self):
            self.total = nnx.Param(jnp.zeros(()))

    plan = jp.plan(Model, mesh, [jp.DP()])

    @plan.jit
    def train(model, rows):
        model.total[...] += rows.sum()
        return model.total[...]

    def stand_still():
        time.sleep(100)

    watch = [Hang(factor=1.5, at_least="3s", first="90s"), Slow(steps=4), Loss()]
    run = Run(home, every=2, writers=(), watch=watch)
    model = run.restore(plan.init())
    seen = []
    for step in run.steps(20):
        if index == 1:
            time.sleep(0.2)
            if step == 11:
                stand_still()
        loss = train(model, rows)
        run.log(loss=math.nan if index == 1 and step == 5 and 5 not in seen else loss)  # one process sees it alone
        seen.append(step)
        if step == 10:
            print(seen, float(loss), flush=True)
"""


@pytest.mark.multiprocess
def test_two_processes(child_env, tmp_path):
    ended = peers(PEER, 2, tmp_path, env=child_env)
    events = read(tmp_path)
    texts = "\n".join(f"{event.process} {event.kind} {event.text}" for event in events)
    assert [peer.code for peer in ended] == [74, 74], f"{texts}\n{ended}"

    again = [*range(1, 7), *range(3, 11)]
    assert [peer.last for peer in ended] == [f"{again} 20.0"] * 2
    of = lambda kind: [event for event in events if event.kind == kind]
    (fault,) = of("nan")
    assert fault.text == (
        "another process found it, in step 5. The run goes back to step 2; the batch of step 5 is left out."
    )
    (slow,) = of("slow")
    assert (slow.process, slow.text[:18]) == (1, "Process 1 takes 0.")
    hangs = {event.process: event for event in of("hang")}
    assert sorted(hangs) == [0, 1]
    assert "It stands at <string>:" in hangs[1].text
    assert "(stand_still); stacks: stacks/step_11/process_1.txt. Left with code 74." in hangs[1].text
    for process, event in hangs.items():
        assert event.text.startswith(f"Process {process} hangs in step 11: ")
        assert (tmp_path / event.more["stacks"]).stat().st_size > 200
