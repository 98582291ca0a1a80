"""Batches made ahead, in a background thread, while the devices compute.

Grain's thread prefetch does the work. A step names a batch whole, so the thread changes no state: the position of the
loader is that of the batches that were *taken*, never of those made ahead. One thread, and no worker processes: making
a batch is a copy out of a memory map, and `mp_prefetch` would have to pickle the source, and parse absl's flags.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from .._errors import DataError


@runtime_checkable
class Stepped(Protocol):
    """What `prefetch` reads of a loader."""

    step: int

    @property
    def num_steps(self) -> int | None: ...

    def batch(self, step: int, /) -> Any: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: Mapping[str, Any], /) -> None: ...


def prefetch(loader: Stepped, put: Callable[[Any], Any], depth: int = 2) -> "Prefetched":
    """Iterate over `put(batch)` for the batches of `loader`, made ahead in a background thread.

    At most `depth` batches wait on the devices beside the one in use; that is their cost in memory.

    Args:
        loader: Batches by step.
        put: Places one batch, as `plan.batch` does; called in the thread, in the order of the steps.
        depth: Batches made ahead, at least 1.

    Raises:
        DataError: `depth` is below 1.

    Example:
        >>> from jaxpar.data import Loader
        >>> loader = Loader([{"x": np.array(i)} for i in range(4)], batch_size=2, seed=None)
        >>> with prefetch(loader, jax.device_put) as batches:
        ...     next(batches)["x"].tolist(), batches.get_state()["step"]
        ([0, 1], 1)
    """
    return Prefetched(loader, lambda step: put(loader.batch(step)), depth)


class Prefetched(contextlib.AbstractContextManager["Prefetched"]):
    """What `prefetch` and `Loader.to` return: an iterator with the state of its loader, to close or use in a `with`.

    The thread starts at the first batch. What goes wrong in it is raised here, in the order of the batches; the batch
    that failed, or that Ctrl-C interrupted, is made again by the next `next()`, so none is ever passed over.
    """

    def __init__(self, loader: Stepped, make: Callable[[int], Any], depth: int) -> None:
        if depth < 1:
            raise DataError(f"depth={depth}: at least 1 batch is made ahead. To make none, iterate over the loader.")
        self._loader = loader
        self._make = make
        self._depth = depth
        self._ahead: Any = None
        self._next_step = 0  # of `_ahead`

    @property
    def step(self) -> int:
        """The step of the batch that `next()` gives."""
        return self._loader.step

    @property
    def num_steps(self) -> int | None:
        """Batches until the end; `None` if there is none."""
        return self._loader.num_steps

    def get_state(self) -> dict[str, Any]:
        """The state of the loader, as of the last batch taken."""
        return self._loader.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; batches made ahead are dropped.

        Raises:
            DataError: The state is of another loader.
        """
        self._loader.set_state(state)

    def close(self) -> None:
        """Stop the thread after the batch it is making, and drop what was made ahead. A later `next()` starts anew."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        loader = self._loader
        if self._ahead is None or self._next_step != loader.step:  # the state was set, here or on the loader itself
            self.close()
            self._ahead = self._start(loader.step)
            self._next_step = loader.step
        try:
            batch = next(self._ahead)
        except StopIteration:
            self.close()
            loader.step = 0
            raise
        except BaseException:  # grain would go on with the batch after
            self.close()
            raise
        loader.step += 1
        self._next_step = loader.step
        return batch

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, step: int) -> Any:
        import grain

        make = self._make  # and not `self`: a Prefetched that is dropped without close() ends its thread too

        def placed(step: int) -> Any:
            batch = make(int(step))
            if batch is None:  # grain would pass over it
                raise DataError(f"Batch {step} is None once placed. `put` returns the batch that it placed.")
            return batch

        stop = sys.maxsize if self.num_steps is None else self.num_steps
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._depth)
        return iter(grain.MapDataset.range(step, stop).map(placed).to_iter_dataset(options))
