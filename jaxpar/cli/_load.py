"""From what was typed to a program: `MODULE:NAME` and a mesh."""

import importlib
import pathlib
import sys
from typing import Any

from .. import _mesh
from .._errors import StepError, nearest
from .._mesh_spec import override
from .._recipe import Program, Recipe


def recipe(name: str) -> Recipe:
    """The recipe that `MODULE:NAME` names.

    Raises:
        StepError: There is no such module or name, or it is not a recipe.
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
        if error.name is not None and not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, something it imports is not
        raise StepError(f"there is no module {module_name!r} in {here}, nor is it installed. Name one of yours.") from None
    found = _attribute(module, module_name, attribute)
    made = found() if callable(found) and not isinstance(found, Recipe) else found
    if not isinstance(made, Recipe):
        raise StepError(
            f"{name} is a {type(made).__name__}, not a recipe. Name a jp.Recipe, or a function without arguments that "
            "returns one."
        )
    return made


def program(name: str, mesh: str | None) -> Program:
    """The recipe that `name` names on the mesh that `mesh` says, or else the environment, or else all devices."""
    found = recipe(name)
    with override(mesh):
        return found.on(_mesh.mesh(fsdp=-1))


def _attribute(module: Any, module_name: str, attribute: str) -> Any:
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [name for name in vars(found) if not name.startswith("_")]
            raise StepError(f"{module_name} has no {attribute!r}.{nearest(part, names)} It has {', '.join(sorted(names))}.")
        found = getattr(found, part)
    return found
