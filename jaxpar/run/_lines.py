"""Lines added to a file, whole or not at all, through a time in which the disk is full.

What the disk refuses is held in memory, and goes before the next line once there is room; a line of which only a part
found room is taken back. A killed process leaves its last line or nothing: each is one write.
"""

import collections
import os
import pathlib
import threading

MOST_HELD = 10_000


class Lines:
    r"""Adds to one file, of which others may be adding to the end as well.

    Args:
        path: The file; its directory is made.

    Example:
        >>> import tempfile
        >>> lines = Lines(pathlib.Path(tempfile.mkdtemp()) / "log")
        >>> lines.add("one"), lines.add("two")
        (None, None)
        >>> lines.path.read_text()
        'one\ntwo\n'
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._held: collections.deque[str] = collections.deque(maxlen=MOST_HELD)
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """How many lines wait for room."""
        return len(self._held)

    def add(self, line: str) -> OSError | None:
        """Add `line`, after those that wait. What the disk says if it refuses: then the line waits."""
        with self._lock:
            self._held.append(line)
            return self._write()

    def flush(self) -> OSError | None:
        """Try again to add the lines that wait."""
        with self._lock:
            return self._write() if self._held else None

    def _write(self) -> OSError | None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                while self._held:
                    _append(descriptor, self._held[0])
                    self._held.popleft()
            finally:
                os.close(descriptor)
        except OSError as error:
            return error
        return None


def _append(descriptor: int, line: str) -> None:
    size = os.fstat(descriptor).st_size
    # A process that died on a full disk may have left a part of a line.
    begin = "\n" if size and os.pread(descriptor, 1, size - 1) != b"\n" else ""
    data = f"{begin}{line}\n".encode()
    written = 0
    try:
        while written < len(data):  # once, unless the disk is full
            written += os.write(descriptor, data[written:])
    except OSError:
        if os.fstat(descriptor).st_size == size + written:  # nobody else has added since
            os.ftruncate(descriptor, size)
        raise
