"""Whatever the documentation shows runs: docstring examples, the README, the notebooks' kept outputs."""

import ast
import doctest
import importlib
import inspect
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import jaxpar

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_OUTPUT = 200_000  # bytes; a code host stops showing a notebook that is much larger

NAMES = {
    "jax": jax, "jaxpar": jaxpar, "jnp": jnp, "jp": jaxpar, "nnx": nnx, "np": np, "optax": optax, "P": PartitionSpec,
}  # fmt: skip


def docstring_examples():
    """Every docstring with a `>>>`, as (module, name, docstring, line): read from the source, nothing is imported."""
    for package in ("jaxpar", "models"):
        for file in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield from _in_body(module, "", ast.parse(file.read_text()))


def _in_body(module, prefix, node):
    text = ast.get_docstring(node)
    if text and ">>>" in text:
        yield pytest.param(module, prefix, text, node.body[0].lineno, id=".".join(filter(None, [module, prefix])))
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _in_body(module, f"{prefix}.{child.name}".removeprefix("."), child)


@pytest.fixture
def own_cache():
    """An example may choose a compilation cache; the tests after it go on with theirs."""
    directory = jax.config.values["jax_compilation_cache_dir"]
    yield
    jax.config.update("jax_compilation_cache_dir", directory)


@pytest.mark.parametrize(("module", "name", "text", "line"), [*docstring_examples()])
def test_docstring(module, name, text, line, own_cache):
    names = NAMES | vars(importlib.import_module(module)) | {"__name__": module}
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.FAIL_FAST
    file = module.replace(".", "/") + ".py"
    example = doctest.DocTestParser().get_doctest(text, names, f"{module}.{name}", file, line - 1)
    report = []
    doctest.DocTestRunner(optionflags=flags).run(example, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize("name", sorted(jaxpar.__all__))
def test_public_function_has_an_example(name):
    """Classes that are only ever returned (`Record`, `Program`) are shown where they come from."""
    thing = getattr(jaxpar, name)
    if inspect.isfunction(thing):
        assert ">>>" in (thing.__doc__ or ""), f"jaxpar.{name} has no `Example:` in its docstring."


def test_readme(tmp_path, monkeypatch):
    """Its Python blocks, in order, as one program."""
    text = (ROOT / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for block in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], ROOT / "README.md", "exec"), names)


def test_readme_links():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_is_committed_with_its_outputs(file):
    """Executed from top to bottom, without an error, and small enough to be shown."""
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run `make notebooks`"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [output for output in outputs if output["output_type"] == "error"] == []
    assert max((len(json.dumps(output)) for output in outputs), default=0) <= MAX_OUTPUT
