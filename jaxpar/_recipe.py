"""A recipe is what does not depend on a mesh; `recipe.on(mesh)` gives a program, which trains.

Explaining, verifying, comparing meshes and restarting on other ones are all the same recipe on another mesh.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from . import _bound, _mesh, _tree
from ._bound import BoundPlan
from ._errors import StepError
from ._grad import differentiate, evaluate
from ._hardware import counted
from ._microbatches import check_microbatches, fits_microbatches
from ._planned import gather_others, gathered_by
from ._precision import Precision, cast
from ._reduced import FewerLayers, fewer_rows
from ._step import StepFunction
from ._strategy import Strategy
from ._types import AnyMesh, Factory, PyTree
from .parallel import FSDP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model, its loss, its optimiser and how to partition it, for any mesh.

    Args:
        model: Makes the model; see `jp.plan`.
        loss: `loss(model, batch)`, a mean or `(sum, weight)`; see `jp.value_and_grad`.
        optimizer: An Optax transformation.
        strategies: How to partition; see `jp.plan`.
        batch: The global batch of one step, as arrays or `jax.ShapeDtypeStruct`s: shapes and dtypes count.
        eval_loss: The loss to evaluate with, if not `loss`. nnx models are in evaluation mode either way.
        accumulate: Into how many microbatches a step splits the batch.
        clip_norm: Scale gradients down to this global norm, the same number on every mesh.
        has_aux: Whether the loss returns scalars beside; they join the metrics.
        weight: The weight of a batch, for a loss that returns a weighted mean.
        separable: Whether the loss is a sum over examples; see `jp.value_and_grad`.
        trainable: Which parameters to train; see `jp.plan`.
        dims: Names of dims; see `jp.plan`.
        precision: Dtypes; `"auto"` computes in bfloat16 on GPUs and TPUs and as stored on CPUs.
        compiler_options: XLA options of the training step.

    Raises:
        StepError: `accumulate` does not divide the batch, or a number is out of range.

    Example:
        >>> recipe = jp.Recipe(
        ...     model=lambda: {"w": jnp.zeros((4, 1))},
        ...     loss=lambda params, batch: jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2),
        ...     optimizer=optax.sgd(0.1),
        ...     strategies=[jp.DP()],
        ...     batch={"x": np.ones((16, 4), np.float32), "y": np.ones((16, 1), np.float32)},
        ... )
        >>> program = recipe.on(jp.mesh(data=-1))
        >>> state, metrics = program.step(program.init(), program.plan.batch(recipe.batch))
        >>> float(metrics["loss"])
        1.0
    """

    model: Factory
    loss: Callable[..., Any]
    optimizer: Any
    strategies: Sequence[Strategy]
    batch: PyTree
    eval_loss: Callable[..., Any] | None = None
    accumulate: int = 1
    clip_norm: float | None = None
    has_aux: bool = False
    weight: Callable[[Any], Any] | None = None
    separable: bool = True
    trainable: Any = None
    dims: Sequence[tuple[str, Sequence[Any]]] = ()
    precision: Precision | Literal["auto"] = "auto"
    compiler_options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategies", tuple(self.strategies))
        if self.accumulate < 1:
            raise StepError(f"Recipe: accumulate is {self.accumulate}. Use 1 for none, or the number of microbatches.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise StepError(f"Recipe: clip_norm is {self.clip_norm}. Use a positive norm, or None for no clipping.")
        rows = self.batch_size
        if rows % self.accumulate:
            below = rows // self.accumulate * self.accumulate
            raise StepError(
                f"Recipe: a batch of {rows} does not divide into accumulate={self.accumulate} microbatches. Use a "
                f"batch of "
                f"{f'{below} or ' if below else ''}{below + self.accumulate}."
            )

    @property
    def batch_size(self) -> int:
        """Rows of the global batch of one step."""
        return next((int(np.shape(leaf)[0]) for leaf in jax.tree.leaves(self.batch) if np.ndim(leaf)), 1)

    def on(self, mesh: AnyMesh) -> "Program":
        """This recipe on `mesh`: plans it, compiles nothing.

        Raises:
            ShardingError: What the plan cannot do.
            StepError: The batch does not divide over the mesh.
        """
        precision = self.precision
        if precision == "auto":
            accelerated = _mesh.hardware_of(mesh).kind in ("gpu", "tpu")
            precision = Precision(compute="bfloat16") if accelerated else Precision()
        plan = _bound.plan(
            self.model,
            mesh,
            self.strategies,
            optimizer=self.transform(),
            trainable=self.trainable,
            dims=self.dims,
            precision=precision,
        )
        self._check_batch(plan)
        return Program(recipe=self, plan=plan)

    def reduced(self, *, layers: int | None = None, batch_size: int | None = None) -> "Recipe":
        """This recipe with fewer layers, a smaller batch, or both: to verify what does not fit one device.

        All that strategies split keeps its size, so that each of them does on the same mesh what it does here. The
        layers that are left out are never made.

        Args:
            layers: The most that any stack of equal blocks keeps: a `jp.Stack` of the model, or a list that
                `FSDP(blocks=...)` names. A model that has neither is made smaller by hand, with `dataclasses.replace`.
            batch_size: Rows of the global batch, the first ones of arrays.

        Raises:
            StepError: `batch_size` is not smaller, or `accumulate` does not divide it; nothing is asked for. From `on`,
                if `layers` changes nothing.

        Example:
            >>> recipe = jp.Recipe(
            ...     model=lambda: jp.Stack(lambda rngs: nnx.Linear(8, 8, rngs=rngs), 48, rngs=nnx.Rngs(0)),
            ...     loss=lambda model, x: jnp.mean(model(x) ** 2),
            ...     optimizer=optax.adam(1e-3),
            ...     strategies=[jp.DP()],
            ...     batch=jax.ShapeDtypeStruct((4096, 8), jnp.float32),
            ... )
            >>> program = recipe.reduced(layers=2, batch_size=16).on(jp.mesh(data=-1))
            >>> program.plan.records["each.kernel"].shape, program.recipe.batch_size
            ((2, 8, 8), 16)
        """
        if layers is None and batch_size is None:
            raise StepError("recipe.reduced: say what to reduce, layers= or batch_size=.")
        if layers is not None and layers < 1:
            raise StepError(f"recipe.reduced: layers is {layers}. Keep at least one.")
        if batch_size is not None and not 0 < batch_size < self.batch_size:
            raise StepError(
                f"recipe.reduced: batch_size is {batch_size}, and the recipe's batch has {self.batch_size} rows. Give "
                "fewer than that, and at least one, or leave it out."
            )
        blocks = tuple(each.blocks for each in self.strategies if isinstance(each, FSDP) and each.blocks is not None)
        return dataclasses.replace(
            self,
            model=self.model if layers is None else FewerLayers(self.model, layers, blocks),
            batch=self.batch if batch_size is None else fewer_rows(self.batch, batch_size),
        )

    def transform(self) -> Any:
        """The optimiser, behind the clipping."""
        if self.clip_norm is None:
            return self.optimizer
        import optax

        return optax.chain(optax.clip_by_global_norm(self.clip_norm), self.optimizer)

    def _check_batch(self, plan: BoundPlan) -> None:
        if plan.stage_axis is not None:
            check_microbatches(plan, self.batch_size, self.accumulate)
            return
        unit = plan.num_batch_shards * self.accumulate
        if self.batch_size % unit:
            below = self.batch_size // unit * unit
            raise StepError(
                f"the global batch of {self.batch_size} is not per-device x accumulate x batch shards: "
                f"{self.accumulate} x {plan.num_batch_shards} = {unit} does not divide it. Use a batch of "
                f"{f'{below} or ' if below else ''}{below + unit}, or another accumulate or mesh."
            )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A recipe on a mesh. Made by `recipe.on(mesh)`.

    Attributes:
        recipe: The recipe.
        plan: Where everything lives.
        train_step: The training step, as `plan.jit` makes it, over the parts of a state.
    """

    recipe: Recipe
    plan: BoundPlan
    train_step: StepFunction = dataclasses.field(init=False)
    _eval_step: StepFunction = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        is_graph = is_graph_plan(self.plan)
        make = _graph_steps if is_graph else _pytree_steps
        train, evaluate = make(self.recipe, self.plan)
        options = self.recipe.compiler_options
        jitted = self.plan.jit(train, donate_argnums=(0, 1), compiler_options=options)
        object.__setattr__(self, "train_step", jitted)
        object.__setattr__(self, "_eval_step", self.plan.jit(evaluate, donate=False, on_recompile="allow"))

    @property
    def batch_identity(self) -> str:
        """Global batch = per device x accumulation x shards, in numbers."""
        shards, accumulate = self.plan.num_batch_shards, self.recipe.accumulate
        if self.plan.stage_axis is not None:
            accumulate = self.plan.schedule.microbatches
        each = self.recipe.batch_size // shards // accumulate
        total = self.recipe.batch_size
        micro = f"{accumulate} microbatch{'' if accumulate == 1 else 'es'}"
        return f"global batch {total} = {each} per device x {micro} x {counted(shards, 'batch shard')}"

    def init(self) -> dict[str, Any]:
        """The state to train: `{"model", "optimizer"}`, every array born where the plan wants it.

        For an nnx model these are the module and its `nnx.Optimizer`, which a step changes in place; for pytrees the
        parameters and the Optax state, which a step returns anew.
        """
        model = self.plan.init()
        transform, wanted = self.recipe.transform(), self.plan.trainable

        def make(model: PyTree) -> Any:
            if _tree.is_graph(model):
                from flax import nnx

                return nnx.Optimizer(model, transform, wrt=wanted)
            return transform.init(self.plan.trained(model))

        return {"model": model, "optimizer": self.plan.make(make, model)}

    def abstract(self) -> tuple[PyTree, Any, PyTree]:
        """What `train_step` takes, model, optimiser and batch, as shapes with shardings; allocates nothing."""
        plan, transform = self.plan, self.recipe.transform()
        model = plan.abstract()
        if _tree.is_graph(model):
            from flax import nnx

            optimizer = nnx.eval_shape(lambda model: nnx.Optimizer(model, transform, wrt=plan.trainable), model)
        else:
            optimizer = jax.eval_shape(transform.init, plan.trained(model))
        whole = plan.sharding(jax.sharding.PartitionSpec())
        flat = _tree.flatten(self.recipe.batch)
        batch = flat.build(
            {
                path: jax.ShapeDtypeStruct(
                    np.shape(leaf),
                    leaf.dtype,
                    sharding=plan.batch_placement(path, np.shape(leaf)) if np.ndim(leaf) else whole,
                )
                for path, leaf in flat.leaves.items()
            }
        )
        return model, optimizer, batch

    def step(self, state: dict[str, Any], batch: PyTree) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """One optimiser step: `(state, metrics)`, metrics being `loss`, `weight`, `grad_norm` and what the loss says.

        The state that went in is given away. `batch` comes from `plan.batch`. Gradients cross each axis that replicates
        parameters once.
        """
        model, optimizer, metrics = self.train_step(state["model"], state["optimizer"], batch)
        return {"model": model, "optimizer": optimizer}, metrics

    def eval_step(self, state: dict[str, Any], batch: PyTree) -> dict[str, jax.Array]:
        """`loss`, `weight` and what the loss says, of one batch; changes nothing.

        Rows of weight 0 (`jp.data.pad_batch`) fill an uneven last batch, so that the mean over batches, each counted by
        its weight, is the true one.
        """
        return self._eval_step(state["model"], batch)

    def __str__(self) -> str:
        return f"{self.plan.table()}\n{self.batch_identity}\nprecision: {self.plan.precision.describe()}"


def is_graph_plan(plan: BoundPlan) -> bool:
    """Whether a plan's model is an nnx object."""
    return _tree.is_graph(plan.birth.build(plan.birth.shapes))


def _metrics(found: Any, norm: Any, recipe: Recipe, plan: BoundPlan) -> dict[str, Any]:
    metrics = {"loss": found.value, "weight": found.weight, "grad_norm": norm}
    return cast({**metrics, **_named(found.aux, recipe)}, plan.precision.output)


def _named(aux: Any, recipe: Recipe) -> dict[str, Any]:
    """What a loss says beside, as metrics by path."""
    return {path or "aux": leaf for path, leaf in _tree.leaves(aux).items()} if recipe.has_aux else {}


def _graph_steps(recipe: Recipe, plan: BoundPlan) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def train_step(model: Any, optimizer: Any, batch: PyTree) -> Any:
        import optax

        found = _differentiated(recipe, model, batch)
        norm = optax.tree.norm(found.gradients)
        optimizer.update(model, found.gradients)
        return model, optimizer, _metrics(found, norm, recipe, plan)

    def eval_step(model: Any, batch: PyTree) -> Any:
        from flax import nnx

        copy = nnx.merge(*nnx.split(model))
        if isinstance(copy, nnx.Module):
            copy.eval()
        return _evaluate(recipe, plan, copy, batch)

    return train_step, eval_step


def _pytree_steps(recipe: Recipe, plan: BoundPlan) -> tuple[Callable[..., Any], Callable[..., Any]]:
    transform = recipe.transform()

    def train_step(params: PyTree, optimizer: Any, batch: PyTree) -> Any:
        import optax

        found = _differentiated(recipe, params, batch)
        gradients, trained = plan.trained(found.gradients), plan.trained(params)
        norm = optax.tree.norm(gradients)
        updates, optimizer = transform.update(gradients, optimizer, trained)
        flat = _tree.flatten(params)
        new = flat.build({**flat.leaves, **_tree.leaves(optax.apply_updates(trained, updates))})
        return new, optimizer, _metrics(found, norm, recipe, plan)

    def eval_step(params: PyTree, batch: PyTree) -> Any:
        gathered = gathered_by(recipe.eval_loss or recipe.loss, params, batch)
        return _evaluate(recipe, plan, gather_others(params, gathered), batch)

    return train_step, eval_step


def _differentiated(recipe: Recipe, model: PyTree, batch: PyTree) -> Any:
    return differentiate(
        recipe.loss,
        model,
        batch,
        accumulate=recipe.accumulate,
        has_aux=recipe.has_aux,
        weight=recipe.weight,
        separable=recipe.separable,
    )


def _evaluate(recipe: Recipe, plan: BoundPlan, model: PyTree, batch: PyTree) -> dict[str, Any]:
    if plan.stage_axis is not None and fits_microbatches(plan, batch):
        found = evaluate(recipe.eval_loss or recipe.loss, model, batch, has_aux=recipe.has_aux, weight=recipe.weight)
        return cast({"loss": found.value, "weight": found.weight, **_named(found.aux, recipe)}, plan.precision.output)
    out = (recipe.eval_loss or recipe.loss)(model, batch)
    aux = None
    if recipe.has_aux:
        out, aux = out
    if isinstance(out, tuple):
        total, weight = out
        value = total / jnp.maximum(weight, 1e-30)
    else:
        rows = next(leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.ndim)
        value, weight = out, jnp.float32(rows) if recipe.weight is None else recipe.weight(batch)
    return cast(
        {"loss": value, "weight": jnp.asarray(weight, jnp.float32), **_named(aux, recipe)}, plan.precision.output
    )
