"""jaxpar: partition a model over a device mesh, see what that costs, prove that it computes the same, and train.

Importing it touches no device, flag or environment variable; each name is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import checkpoint as checkpoint, data as data, testing as testing
    from ._attention import attention as attention
    from ._bound import BoundPlan as BoundPlan, plan as plan
    from ._cache import compilation_cache as compilation_cache
    from ._cluster import initialize as initialize
    from ._constrain import constrain as constrain
    from ._dropout import dropout as dropout
    from ._errors import (
        CheckpointError as CheckpointError,
        DataError as DataError,
        MeshError as MeshError,
        ShardingError as ShardingError,
        StepError as StepError,
    )
    from ._experts import Capacity as Capacity, Dropless as Dropless, experts as experts
    from ._grad import value_and_grad as value_and_grad
    from ._mesh import mesh as mesh, simulate as simulate
    from ._options import compiler_options as compiler_options
    from ._plan import Move as Move, Plan as Plan, Record as Record
    from ._planned import gather as gather
    from ._precision import Precision as Precision
    from ._recipe import Program as Program, Recipe as Recipe
    from ._route import Routing as Routing, balance as balance, route as route, route_by_expert as route_by_expert
    from ._stack import Stack as Stack, remat as remat
    from ._verify import verify as verify
    from ._vocab import cross_entropy as cross_entropy, embed as embed
    from .compare import compare as compare
    from .explain import explain as explain
    from .parallel import CP as CP, DP as DP, EP as EP, FSDP as FSDP, PP as PP, TP as TP, ZeRO as ZeRO
    from .pipeline import Schedule as Schedule, schedule as schedule
    from .run import Run as Run, fit as fit, status as status

__version__ = "0.1.0"

_HOME = {
    "_attention": ("attention",),
    "_bound": ("BoundPlan", "plan"),
    "_cache": ("compilation_cache",),
    "_cluster": ("initialize",),
    "_constrain": ("constrain",),
    "_dropout": ("dropout",),
    "_errors": ("CheckpointError", "DataError", "MeshError", "ShardingError", "StepError"),
    "_experts": ("Capacity", "Dropless", "experts"),
    "_grad": ("value_and_grad",),
    "_mesh": ("mesh", "simulate"),
    "_options": ("compiler_options",),
    "_plan": ("Move", "Plan", "Record"),
    "_planned": ("gather",),
    "_precision": ("Precision",),
    "_recipe": ("Program", "Recipe"),
    "_route": ("Routing", "balance", "route", "route_by_expert"),
    "_stack": ("Stack", "remat"),
    "_verify": ("verify",),
    "_vocab": ("cross_entropy", "embed"),
    "parallel": ("CP", "DP", "EP", "FSDP", "PP", "TP", "ZeRO"),
    "pipeline": ("Schedule", "schedule"),
    "run": ("Run", "fit", "status"),
}
_MODULES = ("checkpoint", "compare", "data", "explain", "testing")  # `compare` and `explain` can be called
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [*sorted(_MODULE_OF), *_MODULES]  # noqa: PLE0604  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
