"""A second process with the same program compiles nothing."""

import subprocess
import sys
import textwrap

SCRIPT = textwrap.dedent("""
    import sys
    import jax
    import jax.numpy as jnp
    import jaxpar as jp

    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
    jp.compilation_cache(sys.argv[1])
    plan = jp.plan(lambda: {"w": jnp.ones((64, 64))}, jp.mesh(fsdp=-1), [jp.FSDP()])
    jax.block_until_ready(plan.init())
    print("hits", len(hits))
""")


def test_the_next_process_compiles_nothing(tmp_path, child_env):
    env = {name: value for name, value in child_env.items() if "CACHE" not in name}

    def hits():
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "cache")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1])

    assert hits() == 0
    assert list((tmp_path / "cache").iterdir())
    assert hits() > 0
