"""From what was typed to a program: `MODULE:NAME` and a mesh."""

import importlib
import importlib.util
import inspect
import math
import pathlib
import pkgutil
import sys
from typing import Any

import jax

from .. import _devices, _mesh
from .._errors import StepError, nearest
from .._mesh_spec import override, parse_spec
from .._recipe import Program, Recipe
from .._types import AnyMesh


def program(name: str, said: str | None) -> Program:
    """The recipe that `name` names, on the mesh that `said` says."""
    found = mesh(said)  # first: a module that makes an array when it is imported starts JAX on what devices there are
    return recipe(name).on(found)


def recipe(name: str) -> Recipe:
    """The recipe that `MODULE:NAME` names, as web servers name apps; the working directory is on the path.

    Raises:
        StepError: There is no such module or name (the nearest is named), or it is not a recipe.
    """
    made = named(name)
    if not isinstance(made, Recipe):
        raise StepError(f"{name} is {_article(type(made).__name__)}, not a recipe. {_WANTED}")
    return made


def named(name: str) -> Any:
    """What `MODULE:NAME` names, called if it can be: a recipe, or a step with its arguments, as a tuple.

    Raises:
        StepError: There is no such module or name, or it is neither.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise StepError(f"{name!r} does not name a recipe. Write MODULE:NAME, as in models.gpt:demo.")
    here = str(pathlib.Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, something it imports is not
        meant = nearest(module_name, _modules(module_name, here))
        raise StepError(
            f"there is no module {module_name!r} in {here}, nor is it installed.{meant} Name one of yours, as in "
            "models.gpt:demo, from the directory that holds it."
        ) from None
    found = _attribute(module, module_name, attribute)
    if callable(found) and not _takes_nothing(found):
        raise StepError(f"{name} takes arguments. {_WANTED}")
    made = found() if callable(found) else found
    if isinstance(made, Recipe) or (isinstance(made, tuple) and made and callable(made[0])):
        return made
    raise StepError(f"{name} is {_article(type(made).__name__)}, not a recipe. {_WANTED}")


_WANTED = "Name a jp.Recipe, or a function that returns one when called without arguments."


def mesh(said: str | None) -> AnyMesh:
    """The mesh that `--mesh` says; else the environment; else all devices on `fsdp`. A CPU simulates those it lacks."""
    if said is None:
        return _mesh.mesh(fsdp=-1)
    spec = parse_spec(said)
    axes: dict[str, Any] = dict(spec.axes) or {"fsdp": -1}
    number = math.prod(axes.values())
    if spec.hardware is None and not _devices.cluster() and _is_cpu() and number > jax.device_count():
        _devices.simulate(number)
    with override(said):  # what is typed counts more than JAXPAR_MESH
        return _mesh.mesh(spec.hardware, dcn=spec.dcn or None, allow_unused=spec.allow_unused, **axes)


def _is_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _takes_nothing(function: Any) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    return True


def _article(word: str) -> str:
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"


def _modules(name: str, here: str) -> list[str]:
    """Modules that might have been meant by `name`."""
    parent, places = name.rpartition(".")[0], [here]
    try:
        spec = importlib.util.find_spec(parent) if parent else None
    except ModuleNotFoundError:
        spec = None
    if spec is not None and spec.submodule_search_locations:
        return [f"{parent}.{each.name}" for each in pkgutil.iter_modules(spec.submodule_search_locations)]
    rest = name.partition(".")[2]
    tops = [each.name for each in pkgutil.iter_modules(places)]
    return [f"{top}.{rest}" if rest else top for top in tops]


def _attribute(module: Any, module_name: str, attribute: str) -> Any:
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = sorted(name for name in vars(found) if not name.startswith("_"))
            raise StepError(f"{module_name} has no {attribute!r}.{nearest(part, names)} It has {', '.join(names)}.")
        found = getattr(found, part)
    return found
