import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from jaxpar import _context
from jaxpar._constrain import constrain
from jaxpar._errors import ShardingError


@dataclasses.dataclass(frozen=True)
class Layout:
    """As much of a plan as an activation sees."""

    mesh: jax.sharding.Mesh
    dims: dict[str, tuple[str, ...]]
    parameters: tuple[()] = ()

    __hash__ = object.__hash__

    @property
    def axes(self):
        return dict(self.mesh.shape)

    @property
    def token_axes(self):
        return tuple(axis for axis in self.dims.get("batch", ()) if self.mesh.shape.get(axis, 1) > 1)


def layout(dims=None, **axes):
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    return Layout(mesh, {"batch": ("data", "fsdp"), "heads": ("tensor",), "mlp": ("tensor",)} if dims is None else dims)


def inside(plan, function, *args, replicas=()):
    """`function` jitted under `plan`, as `plan.jit` does it."""

    @jax.jit
    def step(*args):
        with _context.entered(_context.Region(plan=plan, replicas=replicas)):
            return function(*args)

    return step(*args)


def placed(plan, shape, *dims):
    return inside(plan, lambda x: constrain(x, *dims), jnp.zeros(shape)).sharding.spec


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_dims_lie_on_the_axes_of_the_plan(sizes):
    plan = layout(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    x = inside(plan, lambda x: constrain(x, "batch", "seq", "mlp"), jnp.arange(8.0 * 3 * 4).reshape(8, 3, 4))
    assert (x == jnp.arange(8.0 * 3 * 4).reshape(8, 3, 4)).all()
    assert x.sharding.is_equivalent_to(jax.NamedSharding(plan.mesh, P(("data", "fsdp"), None, "tensor")), 3)


def test_nothing_happens_without_a_plan():
    x = jnp.ones((3, 5))
    assert constrain(x, "batch", "anything") is x


def test_none_leaves_a_dim_to_the_compiler():
    plan = layout(data=2, fsdp=2, tensor=2)
    held = jax.NamedSharding(plan.mesh, P(None, "tensor"))

    def step(x):
        return constrain(jax.lax.with_sharding_constraint(x, held), "batch", None)

    assert "tensor" in inside(plan, step, jnp.zeros((8, 4))).sharding.spec
    assert "tensor" not in inside(plan, lambda x: constrain(step(x), "batch", "embed"), jnp.zeros((8, 4))).sharding.spec


def test_seq_gives_way_to_a_feature_dim_on_the_same_axis():
    """Sequence-parallel norms: `seq` has `tensor` between blocks, `heads` has it inside."""
    plan = layout({"batch": ("data",), "seq": ("context", "tensor"), "heads": ("tensor",)}, data=2, context=2, tensor=2)
    assert placed(plan, (4, 4, 6), "batch", "seq", "embed") == P("data", ("context", "tensor"))
    assert placed(plan, (4, 4, 6, 3), "batch", "seq", "heads", "kv") == P("data", "context", "tensor")


def test_fewer_key_heads_than_devices_are_whole():
    plan = layout({"batch": ("data",), "kv": ("tensor",)}, data=2, tensor=4)
    assert placed(plan, (4, 3, 2, 5), "batch", "seq", "kv", "embed") == P("data")
    assert placed(plan, (4, 3, 8, 5), "batch", "seq", "kv", "embed") == P("data", None, "tensor")
    with pytest.raises(ShardingError, match=r"dim 2 \('kv'\) has size 6, which tensor=4 \(4 parts\) does not divide"):
        placed(plan, (4, 3, 6, 5), "batch", "seq", "kv", "embed")


def test_replica_axes_do_not_exist_inside_their_vmap():
    plan = layout(data=2, fsdp=2, tensor=2)

    def step(x):
        return jax.vmap(lambda x: constrain(x, "batch", None, "mlp"), spmd_axis_name="data")(x)

    x = inside(plan, step, jnp.zeros((2, 4, 3, 6)), replicas=("data",))
    assert x.sharding.is_equivalent_to(jax.NamedSharding(plan.mesh, P("data", "fsdp", None, "tensor")), 4)


def test_scan_and_remat_are_traced_anew_for_another_plan():
    """The same function object, first without a plan, then under two: none keeps what it saw before."""

    @jax.checkpoint
    def body(x):
        return constrain(x * 2, "batch", "mlp")

    def step(x):
        return jax.lax.scan(lambda x, _: (body(x), None), x, None, length=2)[0]

    wide, narrow = layout(data=2, fsdp=1, tensor=4), layout({"batch": ("data", "tensor")}, data=2, tensor=4)
    assert step(jnp.ones((8, 4))).sharding.num_devices == 1
    assert inside(wide, step, jnp.ones((8, 4))).sharding.shard_shape((8, 4)) == (4, 1)
    assert inside(narrow, step, jnp.ones((8, 4))).sharding.shard_shape((8, 4)) == (1, 4)


def test_too_few_dims_is_an_error_with_and_without_a_plan():
    with pytest.raises(ShardingError) as error:
        constrain(jnp.zeros((2, 3)), "batch")
    assert str(error.value) == (
        "constrain: 1 dims ('batch',) for an array with 2 dims (2, 3). "
        "Name each dim once; None leaves one to the compiler."
    )


def test_an_unknown_dim_is_an_error():
    plan = layout({"batch": ("data",), "height": ()}, data=8)
    assert placed(plan, (8, 3), "batch", "height") == P("data")
    with pytest.raises(ShardingError) as error:
        placed(plan, (8, 3), "batch", "hieght")
    assert str(error.value) == (
        "constrain: no logical dim 'hieght'. Did you mean 'height'? This plan knows batch, seq, embed, mlp, heads, kv, "
        "vocab, expert, height; None leaves a dim to the compiler."
    )


def test_every_indivisible_dim_is_named_at_once():
    plan = layout(data=2, fsdp=2, tensor=2)
    with pytest.raises(ShardingError) as error:
        placed(plan, (6, 3), "batch", "mlp")
    assert str(error.value) == (
        "constrain: dim 0 ('batch') has size 6, which data=2 × fsdp=2 (4 parts) does not divide. "
        "The next multiple is 8.\n"
        "constrain: dim 1 ('mlp') has size 3, which tensor=2 (2 parts) does not divide. The next multiple is 4.\n"
        "Use a size that divides, or a mesh with a smaller axis."
    )


def test_two_feature_dims_on_one_axis_is_an_error():
    with pytest.raises(ShardingError, match=r"dims 'heads' and 'mlp' of one array both lie on axis 'tensor'"):
        placed(layout(data=2, fsdp=2, tensor=2), (4, 4), "heads", "mlp")
