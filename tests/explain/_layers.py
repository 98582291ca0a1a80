"""One small model in four forms, of NNX and of Linen, scanned over its layers and written out.

What a layer does between its two matrices is given, so that a test can put a fault there; so is what it does more.
"""

import dataclasses
import functools as ft
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jaxpar as jp

D, F, WIDE, LAYERS = 32, 64, 256, 2


def nothing(hidden):
    return hidden


class Layer(nnx.Module):
    def __init__(self, rngs, form):
        linear = ft.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.up, self.down = linear(form.scale * D, form.scale * F), linear(form.scale * F, form.scale * D)
        self.wide = linear(D, WIDE) if form.is_wide else None
        self.between = form.between

    def __call__(self, x):
        if self.wide is not None:
            x = x + jnp.tanh(self.wide(x))[:, :D]
        return x + self.down(self.between(jnp.tanh(self.up(x))))


class Net(nnx.Module):
    def __init__(self, form, rngs):
        def make(rngs):
            return Layer(rngs, form)

        self.form = form
        if form.is_shared:
            self.layer = make(rngs)
        elif form.is_scanned:
            self.layers = jp.Stack(make, LAYERS, rngs=rngs, remat="none")
        else:
            self.layers = nnx.List([make(rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        if self.form.is_shared and self.form.is_scanned:
            return jax.lax.scan(lambda x, _: (self.layer(x), None), x, length=LAYERS)[0]
        if self.form.is_scanned:
            return self.layers(x)
        for layer in [self.layer] * LAYERS if self.form.is_shared else self.layers:
            x = layer(x)
        return x


class LinenLayer(nn.Module):
    form: "Form"

    @nn.compact
    def __call__(self, x, _=None):
        form, linear = self.form, ft.partial(nn.Dense, use_bias=False)
        if form.is_wide:
            x = x + jnp.tanh(linear(WIDE, name="wide")(x))[:, :D]
        hidden = form.between(jnp.tanh(linear(form.scale * F, name="up")(x)))
        return x + linear(form.scale * D, name="down")(hidden), None


class LinenNet(nn.Module):
    form: "Form"

    @nn.compact
    def __call__(self, x):
        form = self.form
        if form.is_scanned:
            shares = {"variable_broadcast": "params"} if form.is_shared else {"variable_axes": {"params": 0}}
            scanned = nn.scan(LinenLayer, split_rngs={"params": not form.is_shared}, length=LAYERS, **shares)
            return scanned(form, name="layer" if form.is_shared else "layers")(x, None)[0]
        shared = LinenLayer(form, name="layer") if form.is_shared else None
        for index in range(LAYERS):
            x, _ = (shared or LinenLayer(form, name=f"layers_{index}"))(x)
        return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """The model, by whom, how it runs over its layers, and what these do.

    Attributes:
        frontend: `"nnx"` or `"linen"`.
        is_scanned: Whether a scan runs the layers.
        is_shared: Whether all layers are one.
        is_wide: Whether a layer has a third matrix, much larger than the others.
        scale: How many times as large the dims of the two matrices are.
        between: What a layer does between its matrices.
    """

    frontend: str
    is_scanned: bool
    is_shared: bool = False
    is_wide: bool = False
    scale: int = 1
    between: Callable[..., Any] = nothing

    def make(self) -> Any:
        """The model, or its parameters."""
        if self.frontend == "nnx":
            return Net(self, nnx.Rngs(0))
        plain = dataclasses.replace(self, between=nothing)
        return LinenNet(plain).init(jax.random.key(0), jnp.ones((1, self.scale * D)))["params"]

    def run(self, model: Any, x: Any) -> Any:
        """What the last layer gives."""
        return model(x) if self.frontend == "nnx" else LinenNet(self).apply({"params": model}, x)

    def pure(self) -> tuple[Any, Callable[..., Any]]:
        """Parameters as shapes in plain dicts, and `run` as a function of such."""
        made = jax.eval_shape(self.make) if self.frontend == "linen" else nnx.eval_shape(self.make)
        if self.frontend == "linen":
            return made, self.run
        graph, params = nnx.split(made)
        return nnx.to_pure_dict(params), lambda pure, x: nnx.merge(graph, nnx.State(pure))(x)

    @property
    def dims(self) -> tuple[Any, ...]:
        """For `jp.plan`: Linen's scan stacks and says nothing of it."""
        stacks = self.frontend == "linen" and self.is_scanned and not self.is_shared
        return (("layers.*", ("layers", ...)),) if stacks else ()

    def paths(self, leaf: str = "") -> set[str]:
        """Where the layers may be, or a leaf of theirs."""
        if self.is_shared:
            found = {"layer"}
        elif self.is_scanned:
            found = {"layers.each" if self.frontend == "nnx" else "layers"}
        else:
            mark = "." if self.frontend == "nnx" else "_"
            found = {f"layers{mark}{index}" for index in range(LAYERS)}
        return {f"{path}.{leaf}" if leaf else path for path in found}

    @property
    def layer(self) -> type:
        """The class of a layer, where its lines are."""
        return Layer if self.frontend == "nnx" else LinenLayer


FORMS = [Form(frontend=frontend, is_scanned=scanned) for frontend in ("nnx", "linen") for scanned in (True, False)]


def name_of(form: Form) -> str:
    """For pytest."""
    return f"{form.frontend}-{'scanned' if form.is_scanned else 'unrolled'}"


def is_line_of(place: str, where: Any) -> bool:
    """Whether a place names a line of `where`."""
    file, _, line = place.rpartition(" at ")[2].rpartition(":")
    lines, first = inspect.getsourcelines(where)
    return bool(line) and inspect.getfile(where).endswith(file) and first <= int(line) < first + len(lines)
