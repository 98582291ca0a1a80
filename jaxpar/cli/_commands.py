"""What a person types: one class a command, its arguments and what it runs."""

import dataclasses
import pathlib
from typing import Annotated

from tyro.conf import Positional, arg, subcommand

from .._verify import verify
from . import _compare, _doctor, _explain, _load, _train
from ._checkpoint import Checkpoint
from ._launch import Launch, Status

RECIPE = (
    "MODULE:NAME of a jp.Recipe, or of a function that returns one, in your own code: `models.gpt:demo`. The working "
    "directory is on the path."
)
MESH = (
    "Axes (`fsdp=4,tensor=2`), hardware (`v5p-128`), both (`v5p-128:fsdp=32,tensor=2`), or a TOML file. By default all "
    "devices on `fsdp`, or what JAXPAR_MESH says."
)

Recipe = Annotated[Positional[str], arg(metavar="MODULE:NAME", help=RECIPE)]
Mesh = Annotated[str | None, arg(help=MESH)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Show where every leaf of a recipe's program lives, why, and what moves a step. Allocates nothing."""

    recipe: Recipe
    mesh: Mesh = None
    follow: str | None = None
    """The path of one leaf, to see its life instead of the table."""
    json: pathlib.Path | None = None
    """Also write the plan here, as JSON."""
    draw: pathlib.Path | None = None
    """Also draw it here: an .svg, .html or, with matplotlib, .png file."""

    def run(self) -> int:
        """Print the plan."""
        program = _load.program(self.recipe, self.mesh)
        print(program.plan.follow(self.follow) if self.follow else program)
        if self.json:
            self.json.write_text(program.plan.to_json())
        if self.draw:
            program.plan.draw(self.follow).save(self.draw)
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Prove that a recipe's step computes on a mesh what it computes on one device. Exits with 1 if it does not."""

    recipe: Recipe
    mesh: Mesh = None
    layers: int | None = None
    """Reduce its stacks of equal blocks to this many, so that it fits one device; see `Recipe.reduced`."""
    batch_size: int | None = None
    """Reduce its batch to this many rows."""

    def run(self) -> int:
        """Print the table."""
        program = _load.program(self.recipe, self.mesh)
        if self.layers is not None or self.batch_size is not None:
            smaller = program.recipe.reduced(layers=self.layers, batch_size=self.batch_size)
            program = smaller.on(program.plan.mesh)
        print(f"{self.recipe}: {program.plan!r}", flush=True)
        found = verify(program)
        print(found)
        return 0 if found.ok else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train a recipe whose batch has `tokens` and `labels` on text, with checkpoints, evaluation and a progress bar."""

    recipe: Recipe
    mesh: Mesh = None
    steps: int = 1000
    """Of the whole run, those before a --resume included."""
    directory: pathlib.Path = pathlib.Path("runs/train")
    """Where the run lives: metrics, events, checkpoints, plan."""
    resume: bool = False
    """Go on with the run in the directory."""
    data: tuple[pathlib.Path, ...] = ()
    """Text files and directories. By default the Python standard library's own sources."""
    tokenizer: pathlib.Path | None = None
    """A Hugging Face `tokenizer.json`; bytes by default."""
    validation: float = 0.1
    """The share of the text to evaluate on, by document."""
    eval_every: int | None = None
    """Steps between evaluations; by default once, at the end."""
    every: str = "10min"
    """When to save besides the end: `10min`, or steps, `100`, or both, `100,10min`."""
    seed: int = 0
    """Of the order of the data."""
    cache: pathlib.Path = pathlib.Path(".cache/jaxpar")
    """Where tokens and compiled programs are kept between runs."""

    def run(self) -> int:
        """Train, and say how it ended."""
        return _train.train(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor:
    """Print versions and devices, what is missing, and what to type."""

    def run(self) -> int:
        """Print the findings."""
        print(_doctor.report())
        return 0


STEP = "MODULE:NAME of a recipe, or of a function that returns one, or a step and its arguments as a tuple; or "
OPTIONS = "Compiler options: sets of jp.compiler_options (`no-windowed-einsum`), and XLA's own (`xla_name=value`)."

Options = Annotated[tuple[str, ...], arg(help=OPTIONS)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explain:
    """Compile a step, for hardware that is here or not, and report what it costs: memory, collectives, time."""

    what: Annotated[
        Positional[str | None], arg(metavar="MODULE:NAME|FILE", help=STEP + "a file that `jaxpar export` wrote.")
    ] = None
    mesh: Mesh = None
    hlo: pathlib.Path | None = None
    """Explain HLO text that something else compiled, plain, .xz or .gz, instead."""
    target: str | None = None
    """What --hlo was compiled for: hardware (`v5e:16x16`), or a mesh as for --mesh."""
    options: Options = ()
    json: bool = False
    """Print the whole report as one JSON object."""
    html: pathlib.Path | None = None
    """Also write it here, as one HTML file."""
    cache: pathlib.Path | None = None
    """Where compiled programs are kept; by default in the user's cache directory."""

    def run(self) -> int:
        """Print the report."""
        return _explain.run_explain(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write a step, lowered for a mesh, to a file: for `jaxpar explain FILE` where that hardware's compiler is."""

    recipe: Recipe
    mesh: Mesh = None
    output: Annotated[pathlib.Path, arg(aliases=["-o"])]
    """The file."""
    options: Options = ()

    def run(self) -> int:
        """Write the file."""
        return _explain.run_export(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Rank every legal mesh of hardware that is here or not, compile the best few, and say why the first is first."""

    recipe: Recipe
    target: Annotated[str, arg(help="Hardware: `v5p-128`, or several, `v5p-64,v5p-128`.")]
    batch: Annotated[str | None, arg(help="The global batch: tokens, `4M-tokens`, or rows, `1024`.")] = None
    seq: int | None = None
    """Tokens of a sequence, if not the recipe's."""
    tokens: Annotated[str | None, arg(help="To train on, `1T`: for days and cost. By default 20 a parameter.")] = None
    price: Annotated[str | None, arg(help="Of a chip for an hour: `4.2`, or for each target, `v5e=1.2,v5p=4.2`.")] = (
        None
    )
    compile: int = 4
    """How many meshes of each target to compile; 0 for none."""
    json: bool = False
    """Print the comparison as one JSON object."""
    html: pathlib.Path | None = None
    """Also write it here, as one HTML file."""

    def run(self) -> int:
        """Print the table."""
        return _compare.run_compare(self)


Command = (
    Annotated[Train, subcommand("train")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Verify, subcommand("verify")]
    | Annotated[Explain, subcommand("explain")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Checkpoint, subcommand("checkpoint")]
    | Annotated[Launch, subcommand("launch")]
    | Annotated[Status, subcommand("status")]
    | Annotated[Doctor, subcommand("doctor")]
)
