"""`jaxpar checkpoint`: what a directory of checkpoints holds, whether it is whole, and how two differ."""

import dataclasses
import pathlib
from typing import Annotated, Any

from tyro.conf import Positional, arg, subcommand

from .. import checkpoint
from .._errors import CheckpointError
from .._plan_text import bytes_text
from ..checkpoint import _about, _sums
from ..checkpoint._damage import gaps
from ..checkpoint._steps import complete, numbered
from ..explain._units import columns

DIRECTORY = "A directory of checkpoints, the directory of a run, or one checkpoint, `runs/a/checkpoints/100`."

Directory = Annotated[Positional[pathlib.Path], arg(metavar="DIRECTORY", help=DIRECTORY)]
Step = Annotated[int | None, arg(help="Which step; the last complete one by default.")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ls:
    """List the steps of a directory, with size, time and metrics, and say what is incomplete. Reads no array."""

    directory: Directory

    def run(self) -> int:
        """Print a line a step."""
        home, _ = place(self.directory, None)
        rows = [("step", "saved (UTC)", "size", "arrays", "")]
        for step in numbered(home):
            lines = gaps(home / str(step))
            if lines:
                rows.append((f"{step}", "", "", "", f"INCOMPLETE: {lines[0]}"))
                continue
            about = _about.read(home / str(step))
            arrays = sum(leaf.shape is not None for leaf in about.leaves.values())
            said = "  ".join(f"{name} {value:.4g}" for name, value in sorted(about.metrics.items()))
            when = about.saved.replace("T", " ").removesuffix("+00:00")
            rows.append((f"{step}", when, bytes_text(sum(about.files.values())), f"{arrays}", said))
        if len(rows) == 1:
            raise CheckpointError(f"{home} holds no checkpoint. Check the path.")
        print("\n".join(line.rstrip() for line in columns(rows, right=(0, 2, 3))))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Show what one checkpoint holds: every leaf with shape, dtype and size, numbers, states, versions, metadata."""

    directory: Directory
    step: Step = None

    def run(self) -> int:
        """Print the table."""
        home, step = place(self.directory, self.step)
        path = home / str(complete(home, step))
        about = _about.checked(path)
        made_by = ", ".join(f"{name} {version}" for name, version in about.versions.items())
        size = bytes_text(sum(about.files.values()))
        print(f"{path}\nsaved {about.saved} by {made_by}\n{size} in {len(about.files):,} files")
        for title, items in (("metrics", about.metrics), ("states", about.states), ("metadata", about.metadata)):
            if items:
                print("\n".join([f"{title}:", *(f"  {name}: {_short(value)}" for name, value in items.items())]))
        rows = [
            (
                name,
                str(leaf),
                bytes_text(leaf.num_bytes) if leaf.shape is not None else repr(about.values.get(name, "")),
            )
            for name, leaf in about.leaves.items()
        ]
        print("\n".join(line.rstrip() for line in columns(rows, right=(2,))))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Read every byte of every step (or of one) and compare it with what was saved. Exits with 1 if one is damaged."""

    directory: Directory
    step: Annotated[int | None, arg(help="Which step; all by default.")] = None

    def run(self) -> int:
        """Print a line a step, and every damaged file."""
        home, only = place(self.directory, self.step)
        steps = numbered(home) if only is None else [only]
        if not steps:
            raise CheckpointError(f"{home} holds no checkpoint. Check the path.")
        num_damaged = 0
        for step in steps:
            try:
                checkpoint.verify(home, step)
            except CheckpointError as error:
                num_damaged += 1
                print(str(error), flush=True)
            else:
                size = bytes_text(sum(_about.read(home / str(step)).files.values()))
                print(f"{home}: step {step} is whole, {size}.", flush=True)
        return 1 if num_damaged else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a checkpoint anew: a part of it, another dtype, stacks of layers cut or joined. Needs no model."""

    directory: Directory
    target: Annotated[pathlib.Path, arg(aliases=["-o"])]
    """Another directory, for the new checkpoint, of the same step."""
    step: Step = None
    part: str = ""
    """Only what lies below this path: `0`, the parameters of a saved `(model, optimiser)`."""
    dtype: str | None = None
    """For all floating-point arrays: `bfloat16`."""
    cut: Annotated[
        str | None, arg(help="A stack to cut into single layers, `blocks.each.*` to `blocks.0.*`: `blocks`.")
    ] = None
    join: Annotated[str | None, arg(help="Single layers to join into a stack: `blocks`.")] = None

    def run(self) -> int:
        """Write it, and say where."""
        home, step = place(self.directory, self.step)
        step = checkpoint.convert(
            home, self.target, step=step, part=self.part, dtype=self.dtype, cut=self.cut, join=self.join
        )
        print(f"{self.target / str(step)}: written, whole.")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diff:
    """Compare two checkpoints leaf by leaf, whatever mesh or layout they come from. Exits with 1 if they differ."""

    one: Directory
    other: Directory
    step: Step = None
    other_step: Annotated[int | None, arg(help="Of the other; its last complete one by default.")] = None

    def run(self) -> int:
        """Print what differs."""
        (home, step), (other, other_step) = place(self.one, self.step), place(self.other, self.other_step)
        found = checkpoint.diff(home, other, steps=(step, other_step))
        print(found)
        return 1 if found else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """List, show, verify, convert and compare checkpoints."""

    action: Annotated[
        Annotated[Ls, subcommand("ls")]
        | Annotated[Show, subcommand("show")]
        | Annotated[Verify, subcommand("verify")]
        | Annotated[Convert, subcommand("convert")]
        | Annotated[Diff, subcommand("diff")],
        arg(name=""),  # options are called `--step`, not `--action.step`
    ]

    def run(self) -> int:
        """Do what was asked."""
        return self.action.run()


def place(said: pathlib.Path, step: int | None) -> tuple[pathlib.Path, int | None]:
    """The directory of checkpoints that was meant, and the step, if one was named.

    Raises:
        CheckpointError: There is no such directory, or two steps were named.
    """
    if not said.is_dir():
        raise CheckpointError(f"{said} is not a directory. Give one of checkpoints, of a run, or one checkpoint.")
    path = said.absolute()
    if path.name.isdigit() and any((path / name).is_file() for name in (_about.NAME, _sums.NAME)):
        if step not in (None, int(path.name)):
            raise CheckpointError(f"{said} is one step, and --step {step} another. Leave one of them out.")
        return path.parent, int(path.name)
    return (path / "checkpoints" if (path / "run.json").is_file() else path), step


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:96]} ..."
