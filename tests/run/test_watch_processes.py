"""Two real processes: they go back together, the slow one is named, and a hang is told with the stacks of both."""

import re

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
        while True:
            time.sleep(100)

    run = Run(home, every=2, writers=(), watch=[Hang(), Slow(steps=4, at_least=0.5), Loss()])
    model = run.restore(plan.init())
    seen = []
    for step in run.steps(10):
        if index == 1 and len(seen) < 4:
            time.sleep(1.0)
        loss = train(model, rows)
        run.log(loss=math.nan if index == 1 and step == 5 and 5 not in seen else loss)  # one process sees it alone
        seen.append(step)
    print(seen, float(loss), flush=True)

    # The only step with a short deadline is the one that hangs: a busy machine cannot look as if it did.
    run = Run(home, writers=(), watch=[Hang(first="3s")])
    model = run.restore(model)
    for step in run.steps(11):
        if index == 1:
            stand_still()
        train(model, rows)
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
    assert (slow.process, slow.text[:16]) == (1, "Process 1 takes ")
    hangs = {event.process: event for event in of("hang")}
    assert sorted(hangs) == [0, 1]
    assert "It stands at <string>:" in hangs[1].text
    assert "(stand_still); stacks: stacks/step_11/process_1.txt. Left with code 74." in hangs[1].text
    for process, event in hangs.items():
        assert re.match(rf"Process {process} on \S+ hangs in step 11: \d+ s, and it is the first\. ", event.text)
        assert (tmp_path / event.more["stacks"]).stat().st_size > 200
