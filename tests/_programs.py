"""Small programs that every strategy must train alike: models of each kind, their one-device run, their sharded run.

Sizes: D 48 features, F 96 hidden, V 96 tokens, T 8 positions, 8 heads, 2 blocks, batches of 96. They divide over 2, 3,
4, 6 and 8 devices, except the MLP's 10 classes, which divide over nothing: an uneven leaf is an ordinary one.
"""

import dataclasses
import functools as ft
import math
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType

import jaxpar as jp
from jaxpar import _tree
from jaxpar.testing import Comparison, compare
from models import gpt
from models.gpt import config

D, F, V, T, HEADS, LAYERS, ROWS, CLASSES = 48, 96, 96, 8, 8, 2, 96, 10
LEARNING_RATE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A model with its loss, its batch, and what strategies need to know of it.

    Attributes:
        make: The factory.
        loss: As `jp.value_and_grad` wants it.
        batch: A global batch.
        tensor: The rules for `jp.TP`.
        blocks: Where its equal blocks are, for `jp.FSDP`.
        dims: Names of dims, for `jp.plan`.
        has_seq: Whether it splits its sequence dim somewhere.
        is_narrow: Whether it computes in float32 inside, whatever it is given: there is no float64 run then.
    """

    name: str
    make: Callable[[], Any]
    loss: Callable[..., Any]
    batch: dict[str, np.ndarray]
    tensor: dict[str, list[str]]
    blocks: str | None = None
    dims: tuple[Any, ...] = ()
    has_seq: bool = False
    is_narrow: bool = False

    @property
    def __name__(self) -> str:  # where pytest looks for the name of a parameter
        return self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers:
    """What a run computes, by path and on the host: what parameters were, losses, first gradients, last parameters."""

    initial: dict[str, np.ndarray]
    losses: list[float]
    gradients: dict[str, np.ndarray]
    updated: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A sharded run, with what it left behind."""

    numbers: Numbers
    plan: jp.BoundPlan
    step: Any
    state: Any
    args: tuple[Any, ...]


# ---- models


class MLP(nnx.Module):
    def __init__(self, *, rngs):
        self.up = nnx.Linear(D, F, rngs=rngs)
        self.down = nnx.Linear(F, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.gelu(self.up(x)))


class Block(nnx.Module):
    """Causal attention and an MLP, each normed before; says nothing of sharding unless told to."""

    def __init__(self, *, rngs, says_dims=False):
        linear = ft.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.norm1, self.norm2 = nnx.RMSNorm(D, rngs=rngs), nnx.RMSNorm(D, rngs=rngs)
        self.q, self.k, self.v, self.o = linear(D, D), linear(D, D), linear(D, D), linear(D, D)
        self.up, self.down = linear(D, F), linear(F, D)
        self.says_dims = says_dims

    def __call__(self, x):
        h = self.norm1(x)
        q, k, v = (project(h).reshape(*h.shape[:2], HEADS, -1) for project in (self.q, self.k, self.v))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = self._at_rest(x + self.o(mixed.reshape(x.shape)))
        return self._at_rest(x + self.down(jax.nn.gelu(self.up(self.norm2(x)))))

    def _at_rest(self, x):
        return jp.constrain(x, "batch", "seq", "embed") if self.says_dims else x


class Transformer(nnx.Module):
    """A stranger's model: a list of blocks, its own loop, a tied embedding."""

    def __init__(self, *, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.blocks = nnx.List([Block(rngs=rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(D, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


class Stacked(nnx.Module):
    """The same, written for jaxpar: a stack, and dims said."""

    def __init__(self, *, rngs, remat="full"):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.blocks = jp.Stack(lambda rngs: Block(rngs=rngs, says_dims=True), LAYERS, rngs=rngs, remat=remat)
        self.norm = nnx.RMSNorm(D, rngs=rngs)

    def __call__(self, tokens):
        x = jp.embed(self.embed.embedding[...], tokens)
        x = self.blocks(jp.constrain(x, "batch", "seq", "embed"))
        return self.norm(x) @ self.embed.embedding[...].T


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, name="down")(nn.gelu(nn.Dense(F, name="up")(x)))


class EquinoxMLP(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    activation: Callable[..., Any]  # a leaf that is no array

    def __init__(self, key):
        keys = jax.random.split(key)
        self.up, self.down = eqx.nn.Linear(D, F, key=keys[0]), eqx.nn.Linear(F, CLASSES, key=keys[1])
        self.activation = jax.nn.gelu

    def __call__(self, x):
        return self.down(self.activation(self.up(x)))


def make_pytree():
    keys = jax.random.split(jax.random.key(0))
    return {
        "up": {"w": jax.random.normal(keys[0], (D, F)) / 7, "b": jnp.zeros(F)},
        "down": {"w": jax.random.normal(keys[1], (F, CLASSES)) / 10, "b": jnp.zeros(CLASSES)},
    }


def make_stacked_pytree():
    """Residual blocks, their leaves stacked over the layers."""
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "blocks": {
            "up": jax.random.normal(keys[0], (LAYERS, D, F)) / 7,
            "down": jax.random.normal(keys[1], (LAYERS, F, D)) / 10,
            "scale": jnp.ones((LAYERS, D)),
        },
        "head": jax.random.normal(keys[2], (D, CLASSES)) / 7,
    }


def make_linen():
    params = LinenMLP().init(jax.random.key(0), jnp.ones((1, D)))["params"]
    return TrainState.create(apply_fn=LinenMLP().apply, params=params, tx=optax.sgd(LEARNING_RATE))


# ---- losses


def of_classes(logits, batch):
    """The mean over rows: every row counts alike."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], -1).mean()


def of_tokens(logits, batch):
    """The masked sum over tokens, and how many there are: microbatches and replicas weigh differently."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][..., None], -1)[..., 0]
    return -(chosen * batch["weights"]).sum(), batch["weights"].sum()


def mlp_loss(model, batch):
    return of_classes(model(batch["x"]), batch)


def token_loss(model, batch):
    return of_tokens(model(batch["tokens"]), batch)


def linen_loss(params, batch):
    return of_classes(LinenMLP().apply({"params": params}, batch["x"]), batch)


def equinox_loss(model, batch):
    return of_classes(jax.vmap(model)(batch["x"]), batch)


def pytree_loss(params, batch):
    hidden = jax.nn.gelu(batch["x"] @ params["up"]["w"] + params["up"]["b"][None])
    return of_classes(hidden @ params["down"]["w"] + params["down"]["b"][None], batch)


def stacked_pytree_loss(params, batch):
    """Its own scan over the layers, one of which is whole at a time."""

    def block(x, layer):
        layer = jp.gather(layer, "blocks")
        hidden = jax.nn.gelu((x * layer["scale"][None]) @ layer["up"])
        return x + hidden @ layer["down"], None

    x, _ = jax.lax.scan(jp.remat(block, "full"), batch["x"], params["blocks"])
    return of_classes(x @ params["head"], batch)


# ---- batches and cases


def vectors(rows=ROWS):
    random = np.random.default_rng(0)
    return {
        "x": random.standard_normal((rows, D)).astype(np.float32),
        "label": random.integers(0, CLASSES, rows).astype(np.int32),
    }


def texts(rows=ROWS, vocab=V):
    """The first rows lose most of their tokens to the mask, so that a mean of means is far off."""
    random = np.random.default_rng(0)
    text = random.integers(0, vocab, (rows, T + 1)).astype(np.int32)
    kept = random.random((rows, T)) < np.linspace(0.1, 1, rows)[:, None]
    return {"tokens": text[:, :-1], "labels": text[:, 1:], "weights": kept.astype(np.float32)}


_ATTENTION = {"column": ["*.q", "*.k", "*.v", "*.up"], "row": ["*.o", "*.down"]}
_PAIR = {"column": ["*up"], "row": ["*down"]}

CASES = {
    case.name: case
    for case in (
        Case(name="mlp", make=lambda: MLP(rngs=nnx.Rngs(0)), loss=mlp_loss, batch=vectors(), tensor=_PAIR),
        Case(
            name="unrolled",
            make=lambda: Transformer(rngs=nnx.Rngs(0)),
            loss=token_loss,
            batch=texts(),
            tensor={**_ATTENTION, "vocab": ["embed"]},
            blocks="blocks.*",
        ),
        Case(
            name="stack",
            make=lambda: Stacked(rngs=nnx.Rngs(0)),
            loss=token_loss,
            batch=texts(),
            tensor={**_ATTENTION, "vocab": ["embed"]},
            blocks="blocks.*",
            has_seq=True,
        ),
        Case(
            name="gpt",
            make=lambda: gpt.GPT(GPT, rngs=nnx.Rngs(0)),
            loss=gpt.loss,
            batch=texts() | {"positions": np.broadcast_to(np.arange(T, dtype=np.int32), (ROWS, T))},
            tensor={**_ATTENTION, "column": [*_ATTENTION["column"], "*.gate"], "vocab": ["embed"]},
            has_seq=True,
            is_narrow=True,
        ),
        Case(name="linen", make=make_linen, loss=linen_loss, batch=vectors(), tensor=_PAIR),
        Case(name="pytree", make=make_pytree, loss=pytree_loss, batch=vectors(), tensor=_PAIR),
        Case(
            name="stacked-pytree",
            make=make_stacked_pytree,
            loss=stacked_pytree_loss,
            batch=vectors(),
            tensor=_PAIR,
            dims=(("blocks.*", ("layers", ...)),),
        ),
        Case(
            name="equinox",
            make=lambda: EquinoxMLP(jax.random.key(0)),
            loss=equinox_loss,
            batch=vectors(),
            tensor=_PAIR,
        ),
    )
}
GPT = dataclasses.replace(
    config.TINY, vocab_size=V, max_positions=T, embed_dim=D, num_heads=HEADS, num_kv_heads=HEADS, mlp_dim=F
)


def mesh(**axes):
    """A mesh of as many of the eight devices as the axes ask for, the axes in the order given."""
    devices = jax.devices()[: math.prod(axes.values())]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes), devices=devices)


# ---- one device: plain JAX


@ft.cache
def reference(case: Case, *, wide: bool = False, steps: int = 2) -> Numbers:
    """`case` on one device, by nothing but JAX: in float32, or in float64 from the same initial values."""
    made: dict[str, Any] = {}

    def start():
        made["flat"] = _tree.flatten(params_of(case.make()))
        return made["flat"].leaves

    initial = jax.jit(start)()
    flat = made["flat"]
    trained = [path for path, leaf in initial.items() if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def mean(values, batch):
        return mean_of(case.loss(flat.build({**initial, **values}), batch))

    @jax.jit
    def step(values, batch):
        loss, gradients = jax.value_and_grad(mean)(values, batch)
        return loss, gradients, {path: leaf - LEARNING_RATE * gradients[path] for path, leaf in values.items()}

    with jax.enable_x64(wide), jax.numpy_dtype_promotion("standard" if wide else "strict"):
        as_float = lambda leaf: leaf.astype(np.float64) if wide and leaf.dtype == np.float32 else leaf
        values = {path: as_float(np.asarray(initial[path])) for path in trained}
        batch = {name: as_float(leaf) for name, leaf in case.batch.items()}
        losses, first = [], None
        for _ in range(steps):
            loss, gradients, values = step(values, batch)
            losses.append(loss)
            first = gradients if first is None else first
    return Numbers(
        initial=host(initial), losses=[float(x) for x in losses], gradients=host(first), updated=host(values)
    )


def mean_of(out):
    return out[0] / out[1] if isinstance(out, tuple) else out


def params_of(tree):
    return tree.params if isinstance(tree, TrainState) else tree


def host(leaves):
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


# ---- sharded: each kind in its user's own loop


def train(case: Case, on: Any, strategies: Any, *, accumulate: int = 1, steps: int = 2, **options: Any) -> Trained:
    """`case` in a loop like its user's, on a mesh."""
    plan = jp.plan(case.make, on, strategies, dims=case.dims, **options)
    state = plan.init()
    initial = host(_tree.leaves(params_of(state)))
    grad = jp.value_and_grad(case.loss, accumulate=accumulate)
    step, args, get = _loop(state, plan, grad)
    batch = plan.batch(case.batch)
    losses, first = [], None
    for _ in range(steps):
        (loss, gradients), args = step_once(step, args, batch)
        losses.append(loss)
        first = _tree.leaves(gradients) if first is None else first
    numbers = Numbers(
        initial=initial,
        losses=[float(loss) for loss in losses],
        gradients=host(first),
        updated=host({path: leaf for path, leaf in _tree.leaves(get(args)).items() if path in first}),
    )
    return Trained(numbers=numbers, plan=plan, step=step, state=args, args=(*args, batch))


def step_once(step, args, batch):
    """Call a step of `_loop`: what it says, and the state after."""
    out = step(*args, batch)
    return (out, args) if len(out) == 2 else (out[-2:], out[:-2])


def _loop(state, plan, grad):
    tx = optax.sgd(LEARNING_RATE)
    if isinstance(state, nnx.Module):
        opt = nnx.Optimizer(state, tx, wrt=nnx.Param)

        @plan.jit
        def nnx_step(model, opt, batch):
            loss, gradients = grad(model, batch)
            opt.update(model, gradients)
            return loss, gradients

        return nnx_step, (state, opt), lambda args: args[0]
    if isinstance(state, TrainState):

        @plan.jit
        def linen_step(state, batch):
            loss, gradients = grad(state.params, batch)
            return state.apply_gradients(grads=gradients), loss, gradients

        return linen_step, (state,), lambda args: args[0].params

    @plan.jit
    def pytree_step(params, opt_state, batch):
        loss, gradients = grad(params, batch)
        updates, opt_state = tx.update(gradients, opt_state)
        return eqx.apply_updates(params, updates), opt_state, loss, gradients

    return pytree_step, (state, tx.init(eqx.filter(state, eqx.is_array))), lambda args: args[0]


# ---- the comparison


def check_same(case: Case, trained: Trained) -> Comparison:
    """Assert that a sharded run has the numbers of one device: initial values to the bit, the rest by the criterion."""
    ours, one = trained.numbers, reference(case)
    true = None if case.is_narrow else reference(case, wide=True)
    expected = stacked_like(one.initial, ours.initial)
    different = [path for path, leaf in ours.initial.items() if not np.array_equal(leaf, expected[path])]
    assert not different, f"initial values differ: {different}"
    tables = []
    for group in ("losses", "gradients", "updated"):
        mine, single, exact = (getattr(each, group) if each else None for each in (ours, one, true))
        if group == "losses":
            mine, single, exact = (
                each and {str(i): np.asarray(x, dtype) for i, x in enumerate(each)}
                for each, dtype in ((mine, np.float32), (single, np.float32), (exact, np.float64))
            )
        else:
            single, exact = (each and stacked_like(each, mine) for each in (single, exact))
        tables.append(compare(mine, single, exact, group=group))
    table = ft.reduce(lambda a, b: a + b, tables)
    assert table.ok, str(table)
    return table


def stacked_like(leaves: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """`leaves` of an unrolled model under the paths of its stacked twin: `blocks.0.q` and on as `blocks.each.q`.

    The layers of a stack in a pipeline of several chunks are counted by two dims, in the same order.
    """
    if leaves.keys() == like.keys():
        return {path: leaf.reshape(np.shape(like[path])) if ".each." in path else leaf for path, leaf in leaves.items()}

    def find(path):
        if path in leaves:
            return leaves[path]
        pattern = re.compile(re.escape(path).replace(r"\.each\.", r"\.(\d+)\."))
        layers = {int(found[1]): leaf for name, leaf in leaves.items() if (found := pattern.fullmatch(name))}
        return np.stack([layers[index] for index in range(len(layers))])

    return {path: find(path) for path in like}
