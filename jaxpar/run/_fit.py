"""The loop, written: a few lines over `Run`."""

import dataclasses
import inspect
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from .._errors import CheckpointError, DataError
from .._types import PyTree
from ..checkpoint import Keep
from . import _exits, _launched
from ._every import parse_every
from ._progress import Pace, progress
from ._run import Run
from ._watch import DEFAULT, Watcher
from ._writers import Writer

TOKENS = ("tokens", "input_ids", "inputs")  # fields of a batch that are counted as tokens, if they hold integers


@runtime_checkable
class Program(Protocol):
    """What `fit` calls: `recipe.on(mesh)`, or anything that has these.

    Attributes:
        plan: `plan.batch(batch)` places this process's part of a batch on the devices.
    """

    @property
    def plan(self) -> Any: ...

    def init(self) -> PyTree:
        """A new state."""
        ...

    def step(self, state: PyTree, batch: PyTree) -> tuple[PyTree, Mapping[str, Any]]:
        """The state after a step, and its scalar metrics, `loss` among them."""
        ...

    def eval_step(self, state: PyTree, batch: PyTree) -> Mapping[str, Any]:
        """`loss`, a mean, and the `weight` it is a mean over."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """How `fit` ended.

    Attributes:
        state: The state after the last step.
        steps: Steps done, those before a restart included.
        metrics: The last value of each metric.
        directory: Where the run lives.
        stopped_by: `"SIGINT"` if Ctrl-C ended it early, else `None`.
    """

    state: PyTree = dataclasses.field(repr=False)
    steps: int
    metrics: Mapping[str, float]
    directory: pathlib.Path
    stopped_by: str | None

    @property
    def exit_code(self) -> int:
        """For `sys.exit`: 130 after Ctrl-C, else 0."""
        return _exits.OF_STOP.get(self.stopped_by or "", _exits.DONE)


def fit(
    program: Program,
    data: Any,
    *,
    steps: int,
    directory: str | os.PathLike[str],
    every: int | str | Sequence[int | str] | None = "10min",
    keep: int | Keep | None = 3,
    eval_data: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
    eval_every: int | str | None = None,
    resume: bool = False,
    writers: Sequence[Writer] = (),
    name: str | None = None,
    watch: Sequence[Watcher] = DEFAULT,
) -> Fitted:
    """Train for `steps`, showing progress, saving and evaluating: the loop of `Run`, written out.

    Shows a progress bar on a terminal and plain lines elsewhere, with loss, tokens or examples per second, and time
    left. With `resume` it goes on from the latest checkpoint, to the same bits as an uninterrupted run on the same mesh
    and versions. Ctrl-C finishes the step, saves and returns; SIGTERM finishes, saves, and exits with code 75.

    Args:
        program: What `recipe.on(mesh)` returns.
        data: Batches, as this process's part of each, with `get_state` and `set_state`: a `jaxpar.data.Loader`, which
            is prefetched onto the devices, or any such iterator.
        steps: Of the whole run, those before a restart included.
        directory: Where the run lives; see `Run`.
        every: When to save, besides the end: steps, a time, or both, as for `Run`.
        keep: How many of the last checkpoints are kept, or a `jp.checkpoint.Keep`; `None` keeps all.
        eval_data: Batches to evaluate on, all of them each time; or a function that returns them.
        eval_every: Steps between evaluations; only at the end if `None`.
        resume: Go on with the run in `directory`, if there is one. Without it, a directory with one is refused, unless
            `jaxpar launch` or SLURM has started this script again: then it goes on.
        writers: Where metrics go besides `metrics.jsonl` and the terminal.
        name: What this run is; see `Run`.
        watch: What is looked for, so that the run goes back, or ends to be started again; see `Run`.
    Returns:
        The state, the last metrics (`loss`, and `eval/loss`: the mean over all weights), and how it ended.
    Raises:
        CheckpointError: `directory` holds a run and `resume` is not given, or one of another program.
        DataError: The data has no state, ends before `steps`, or there is nothing to evaluate on.

    Example:
        >>> import tempfile
        >>> class Program:  # in earnest: jp.Recipe(...).on(mesh)
        ...     plan = jp.plan(lambda: {"w": jnp.zeros((8, 8))}, jp.mesh(data=-1), [jp.DP()])
        ...
        ...     def init(self):
        ...         return self.plan.init()
        ...
        ...     def step(self, state, batch):
        ...         return {"w": state["w"] - 0.1}, {"loss": state["w"].mean(), "weight": 8.0}
        ...
        ...     def eval_step(self, state, batch):
        ...         return {"loss": state["w"].mean(), "weight": 8.0}
        >>> from jaxpar.data import Loader
        >>> data = Loader([{"x": np.zeros(3)} for _ in range(16)], batch_size=8)
        >>> fit(Program(), data, steps=2, directory=tempfile.mkdtemp()).steps
        step 1/2  loss 0
        step 2/2  loss -0.1 ...
        2
    """
    evaluate_every = parse_every(eval_every)
    if evaluate_every.seconds is not None:
        raise DataError(f"eval_every={eval_every!r}: evaluation goes by steps, so that a resumed run does the same.")
    if eval_every is not None and eval_data is None:
        raise DataError(f"eval_every={eval_every!r} has no effect without eval_data. Give both, or neither.")
    pace = Pace(steps)
    run = Run(
        directory, every=every, keep=keep, writers=(progress(pace), *writers), name=name,
        metadata=_described(program), watch=watch,
    )  # fmt: skip
    if run.latest is not None and not (resume or _launched.is_restart()):
        raise CheckpointError(
            f"{run.directory} holds a run, saved up to step {run.latest}. Go on with it by resume=True (--resume on "
            "the command line), or choose another directory."
        )
    batches = _source(data, program, steps)
    state, batches = run.restore((program.init(), batches), donate=True)
    try:
        for step in run.steps(steps):
            state, batches = run.state  # after a fault the run has gone back
            batch = _next(batches, step, steps)
            pace.per_step, pace.unit = _count(batch)
            state, metrics = program.step(state, _placed(batch, program))
            run.update((state, batches))
            run.log(metrics)
            if eval_data is not None and (step == steps or step % (evaluate_every.steps or steps) == 0):
                run.log({"eval/loss": evaluate(program, state, eval_data)})
    finally:
        getattr(batches, "close", lambda: None)()
    return Fitted(state=state, steps=run.step, metrics=run.metrics, directory=run.directory, stopped_by=run.stopped_by)


def _described(program: Program) -> dict[str, Any]:
    """What a checkpoint keeps of the program: its plan and recipe, to be read by people. A restore needs neither."""
    found: dict[str, Any] = {}
    if hasattr(program.plan, "to_json"):
        found["plan"] = json.loads(program.plan.to_json())
    recipe = getattr(program, "recipe", None)
    if dataclasses.is_dataclass(recipe):
        fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
        fields["batch"] = jax.tree.map(np.shape, fields.get("batch"))
        found["recipe"] = {name: _shown(value) for name, value in fields.items() if value is not None}
    return found


def _shown(value: Any) -> str:
    if inspect.isfunction(value) or inspect.isclass(value):
        return f"{value.__module__}:{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # an address says nothing after the run


def evaluate(program: Program, state: PyTree, data: Iterable[Any] | Callable[[], Iterable[Any]]) -> float:
    """The mean loss over all weights of `data`: sums are of `loss * weight`, in float64, on the host.

    Raises:
        DataError: There is no batch, the weights are all zero, or the data has no end.
    """
    batches: Any = data() if callable(data) else data
    if getattr(batches, "num_steps", 0) is None:
        raise DataError("eval_data has no end, so an evaluation would not either. Give Loader(..., epochs=1).")
    if hasattr(batches, "to"):
        batches = batches.to(program.plan)
    # Fetched one batch late, so that the devices are never idle and little is held.
    sums, behind = np.zeros(2), None
    for batch in batches:
        sums += _sums(behind)
        behind = program.eval_step(state, _placed(batch, program))
    sums += _sums(behind)
    if behind is None or not sums[1]:
        what = (
            "gave no batch: an iterator serves one evaluation, so give a list or a function"
            if behind is None
            else ("has weights that are all zero")
        )
        raise DataError(f"eval_data {what}.")
    return float(sums[0] / sums[1])


def _sums(metrics: Mapping[str, Any] | None) -> np.ndarray:
    """`[loss * weight, weight]`."""
    if metrics is None:
        return np.zeros(2)
    loss, weight = (float(np.asarray(metrics[name])) for name in ("loss", "weight"))
    return np.array([loss * weight if weight else 0.0, weight])


def _source(data: Any, program: Program, steps: int) -> Iterator[Any]:
    """An iterator with a state, over host or global batches."""
    source = data.to(program.plan) if hasattr(data, "to") else iter(data)
    if not all(hasattr(source, method) for method in ("get_state", "set_state")):
        raise DataError(
            f"data: a {type(source).__name__} has no get_state and set_state, so a resumed run would repeat batches. "
            "Use jaxpar.data.Loader, or give both methods (their state is JSON)."
        )
    num_steps = getattr(source, "num_steps", None)
    if num_steps is not None and num_steps < steps:
        raise DataError(f"steps={steps}, and the data ends after {num_steps}. Give fewer, or endless data.")
    return source


def _next(batches: Iterator[Any], step: int, steps: int) -> Any:
    try:
        return next(batches)
    except StopIteration:
        raise DataError(f"steps={steps}, and the data ends after {step - 1}. Give fewer, or endless data.") from None


def _placed(batch: Any, program: Program) -> Any:
    """The global batch; one from a prefetching loader is global already."""
    is_global = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch))
    return batch if is_global else program.plan.batch(batch)


def _count(batch: Any) -> tuple[int, str]:
    """How much a batch is: its tokens if it has a field of them, else its examples, over all processes."""
    leaves = [leaf for leaf in jax.tree.leaves(batch) if np.ndim(leaf)]
    processes = 1 if all(isinstance(leaf, jax.Array) for leaf in leaves) else jax.process_count()
    if isinstance(batch, Mapping):
        for name in TOKENS:
            if name in batch and np.ndim(batch[name]) == 2 and np.issubdtype(batch[name].dtype, np.integer):
                return int(np.size(batch[name])) * processes, "tokens"
    return (len(leaves[0]) * processes if leaves else 0), "examples"
