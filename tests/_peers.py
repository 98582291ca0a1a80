"""Processes that run one script and find one another by a port: what tests of several processes start."""

import dataclasses
import socket
import subprocess
import sys
import textwrap


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """A process that ended: its exit code, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def last(self):
        """The last line that it printed."""
        return self.out.splitlines()[-1]


def peers(script, num, *arguments, env, devices=1, seconds=240):
    """`num` processes of `script`, each with `sys.argv[1:] = [index, port, *arguments]`, when all have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", textwrap.dedent(script)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {**env, "JAX_NUM_CPU_DEVICES": str(devices)}
    started = [subprocess.Popen([*command, str(index), port, *arguments], env=env, **pipes) for index in range(num)]
    try:
        said = [each.communicate(timeout=seconds) for each in started]
    finally:
        for each in started:
            each.kill()
            each.wait()
    return [Peer(code=each.returncode, out=out, err=err) for each, (out, err) in zip(started, said, strict=True)]
