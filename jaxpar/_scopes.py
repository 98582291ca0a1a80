"""Operations named by where in the model they are made, so that a report and a profile can say it.

JAX names an operation by the scopes that were open when it was traced (`jit(step)/jvp(blocks)/while/body/each/attn/q/
dot_general`). Linen opens one for each module; NNX opens none, so while a step is traced each call of a module of its
models opens one here. Where a module lives is read off the plan paths of its variables, which survive the copies that
NNX's transformations make; one without variables goes by its attribute's name in the module that calls it.

What is changed for that is `__call__` of the modules' types, only while a step is traced; a subclass for each, as
variables get one, would show in `type(module)`, which models do look at.
"""

import contextlib
import contextvars
import functools as ft
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from . import _context
from ._planned import PATH, scope_of

UPDATE = "update"
"""The scope of an optimiser's update."""


@contextlib.contextmanager
def named(nodes: tuple[Any, ...]) -> Iterator[None]:
    """While this lasts, calls of the modules in `nodes` name what they compute, and so do updates of optimisers."""
    wanted = _methods(nodes)
    with _lock:
        for owner, name in wanted:
            _open(owner, name)
    try:
        yield
    finally:
        with _lock:
            for owner, name in wanted:
                _close(owner, name)


_lock = threading.Lock()
_opened: dict[tuple[type, str], list[Any]] = {}  # how many traces want it, and the method itself
_enclosing: contextvars.ContextVar[tuple[Any, str] | None] = contextvars.ContextVar("jaxpar_module", default=None)


def _methods(nodes: tuple[Any, ...]) -> list[tuple[type, str]]:
    """The types that define what modules and optimisers in `nodes` do when called, and the method's name."""
    if not nodes:
        return []
    from flax import nnx

    types = dict.fromkeys(
        type(node) for _, node in nnx.iter_graph(nodes) if isinstance(node, nnx.Module | nnx.Optimizer)
    )
    found = {}
    for each in types:
        name = "update" if issubclass(each, nnx.Optimizer) else "__call__"
        owner = next((base for base in each.__mro__ if name in vars(base)), None)
        if owner is not None and owner is not object:
            found[owner, name] = None
    return list(found)


def _open(owner: type, name: str) -> None:
    held = _opened.setdefault((owner, name), [0, vars(owner)[name]])
    held[0] += 1
    if held[0] == 1:
        setattr(owner, name, _updating(held[1]) if name == "update" else _naming(held[1]))


def _close(owner: type, name: str) -> None:
    held = _opened[owner, name]
    held[0] -= 1
    if held[0] == 0:
        setattr(owner, name, held[1])
        del _opened[owner, name]


def _updating(method: Callable[..., Any]) -> Callable[..., Any]:
    @ft.wraps(method)
    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(UPDATE) if _context.current() is not None else contextlib.nullcontext():
            return method(self, *args, **kwargs)

    return update


def _naming(method: Callable[..., Any]) -> Callable[..., Any]:
    @ft.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        path = _path_of(self) if _context.current() is not None else None
        if path is None:
            return method(self, *args, **kwargs)
        outside = _enclosing.get()
        token = _enclosing.set((self, path))
        try:
            with jax.named_scope(scope) if (scope := _scope(path, outside)) else contextlib.nullcontext():
                return method(self, *args, **kwargs)
        finally:
            _enclosing.reset(token)

    return call


def _scope(path: str, outside: tuple[Any, str] | None) -> str:
    """The names to open for `path` inside of what is open already."""
    before = outside[1] if outside is not None else ""
    if path == before:  # `super().__call__`
        return ""
    inside = not before or path.startswith(f"{before}.")
    return (path[len(before) + 1 :] if before else path).replace(".", "/") if inside else scope_of(path)


def _path_of(module: Any) -> str | None:
    """Where `module` lives in the plan's model; `""` for the model itself, `None` if that cannot be told."""
    from flax import nnx

    for keys, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Variable) and PATH in node.get_metadata():
            path, inside = node.get_metadata(PATH), ".".join(map(str, keys))
            if path == inside:
                return ""
            if path.endswith(f".{inside}"):
                return path[: -len(inside) - 1]
    outside = _enclosing.get()
    if outside is None:
        return None
    name = next((name for name, value in vars(outside[0]).items() if value is module), None)
    return None if name is None else ".".join(part for part in (outside[1], name) if part)
