"""What a model sees of the plan while it is traced, and what it must not remember of it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jaxpar as jp
from jaxpar import _context
from jaxpar._context import Region, as_spec, axes_at, drop_axes


@dataclasses.dataclass(eq=False)
class Layout:
    """As much of a plan as a region reads."""

    mesh: object
    dims: dict


def region(replicas=()):
    mesh = jp.mesh(data=2, fsdp=2, tensor=2)
    return Region(plan=Layout(mesh, {"batch": ("data", "fsdp"), "mlp": ("tensor",)}), replicas=replicas)


@pytest.mark.parametrize(
    ("entries", "spec"),
    [
        ([], P()),
        ([(), ()], P()),
        ([("a",), ()], P("a")),
        ([(), ("a", "b")], P(None, ("a", "b"))),
        ([None, ("a",), None], P(None, "a")),
    ],
)
def test_a_spec_has_one_spelling(entries, spec):
    assert as_spec(entries) == spec


def test_axes_at_reads_every_spelling_of_an_entry():
    assert [axes_at(entry) for entry in P("a", None, ("a", "b"), P.UNCONSTRAINED)] == [("a",), (), ("a", "b"), ()]


def test_drop_axes_leaves_the_others_in_place():
    assert drop_axes(P(("data", "fsdp"), "tensor", "data"), ("data",)) == P("fsdp", "tensor")


def test_a_region_has_the_plans_axes_less_the_replicas():
    assert region().batch_axes == ("data", "fsdp")
    assert region().axes_of("mlp") == ("tensor",)
    assert region().axes_of("seq") == ()
    inside = region(("data",))
    assert inside.batch_axes == ("fsdp",)
    assert inside.sharding(P(("data", "fsdp"))).spec == P("fsdp")


def test_regions_are_equal_by_identity_of_the_plan():
    one, other = region(), region()
    assert one == Region(plan=one.plan)
    assert hash(one) == hash(Region(plan=one.plan))
    assert one != other
    assert one != Region(plan=one.plan, replicas=("data",))


def test_the_region_is_left_also_by_an_error():
    assert _context.current() is None
    with _context.entered(region()):
        assert _context.current() is not None
    with pytest.raises(ZeroDivisionError), _context.entered(region()):
        _ = 1 / 0
    assert _context.current() is None


def test_a_jitted_helper_is_traced_anew_in_another_region():
    """What a ContextVar does not do: `jax.jit` would keep what it saw in the first region."""
    seen = []

    @jax.jit
    def helper(x):
        seen.append(_context.current())
        return x

    plans = [None, region(), region()]
    for each in [*plans, *plans]:
        with _context.entered(each):
            helper(jnp.ones(2))
    assert seen == plans
