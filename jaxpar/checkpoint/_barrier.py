"""Waiting for every process of a save or restore: bounded, by name, and over at once when one of them has failed.

JAX's and Orbax's barriers know time alone: if the disk of one process is full, the others wait for 20 minutes and learn
nothing. Here each process leaves a word with the coordination service: that it has come, or what went wrong.

    jaxpar/save/7/written/2    "node7"    process 2 has come here
    jaxpar/save/7/written      "all"      process 0 has seen all of them
    jaxpar/save/7/failed       "process 2 on node7: No space left on device"

It asks that service and not the devices, so that a background thread may wait while a step runs.
"""

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from .. import _compat
from .._errors import CheckpointError

SECONDS = 1200.0  # at most: the slowest process may write and hash for a while
SLICE = 1.0  # how long a failure elsewhere may go unnoticed
_count = itertools.count()


class Barrier:
    """Made once a save or restore by all processes; then called by all with the same words, one after another."""

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = SECONDS if seconds is None else seconds
        number = next(_count)
        self._prefix = f"jaxpar/save/{number}"
        self._client: Any = _compat.coordination_client() if jax.process_count() > 1 else None
        self._hosts: dict[int, str] = {}
        if self._client and jax.process_index() == 0 and number > 1:
            with contextlib.suppress(RuntimeError):
                self._client.key_value_delete(f"jaxpar/save/{number - 2}/")  # nobody waits there any more

    def __call__(self, words: str) -> None:
        """Return when every process has called it with these words.

        Raises:
            CheckpointError: One of them failed, or some have not come in time: named.
        """
        if self._client is None:
            return
        self._set(f"{words}/{jax.process_index()}", socket.gethostname())
        until = time.monotonic() + self._seconds
        seen = self._gather if jax.process_index() == 0 else self._hear
        while not seen(words):
            self.check()
            if time.monotonic() > until:
                missing = [index for index in range(jax.process_count()) if index not in self._come(words)]
                raise CheckpointError(
                    f"after {self._seconds:.0f} s {self._named(missing)} had not come as far as {words!r}. Look there: "
                    "it is dead, cut off, or its storage hangs."
                )

    def fail(self, error: BaseException) -> None:
        """Tell the others what went wrong here, so that they wait no longer."""
        if self._client is not None:
            self._set("failed", f"process {jax.process_index()} on {socket.gethostname()}: {error}")

    def check(self) -> None:
        """Raise what went wrong on another process, if something did."""
        if self._client is None:
            return
        try:
            text = self._client.key_value_try_get(f"{self._prefix}/failed")
        except Exception:  # "not found" comes as an error of the runtime, whose class is private
            return
        raise CheckpointError(text)

    def until(self, wait: Callable[[], None]) -> None:
        """Return when `wait` does, or raise when another process has failed: `wait` may then never return."""
        if self._client is None:
            wait()
            return
        caught: list[BaseException] = []

        def work() -> None:
            try:
                wait()
            except BaseException as error:  # raised below, where somebody listens
                caught.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(SLICE)
            if thread.is_alive():
                self.check()
        if caught:
            raise caught[0]

    def _gather(self, words: str) -> bool:
        """Whether all have come; process 0 then says so."""
        if len(self._come(words)) < jax.process_count():
            time.sleep(0.02)
            return False
        self._set(words, "all")
        return True

    def _hear(self, words: str) -> bool:
        """Whether process 0 has said that all have come; it is waited for a while."""
        try:
            self._client.blocking_key_value_get(f"{self._prefix}/{words}", int(SLICE * 1000))
        except Exception as error:  # as above
            if "DEADLINE_EXCEEDED" not in str(error):
                raise CheckpointError(f"process 0 does not answer: {error}") from error
            return False
        return True

    def _come(self, words: str) -> set[int]:
        found = self._client.key_value_dir_get(f"{self._prefix}/{words}/")
        come = {int(key.rpartition("/")[2]): host for key, host in found}
        self._hosts |= come
        return set(come)

    def _named(self, processes: list[int]) -> str:
        known = [f"{index} on {self._hosts[index]}" if index in self._hosts else f"{index}" for index in processes]
        return f"process{'es' if len(known) > 1 else ''} {', '.join(known)}"

    def _set(self, key: str, value: str) -> None:
        self._client.key_value_set(f"{self._prefix}/{key}", value, allow_overwrite=True)
