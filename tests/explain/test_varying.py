"""Over which axes the values of a program differ: what arguments say of themselves, and what spreads from them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxpar import _hlo
from jaxpar._hlo._text import Op, Shape
from jaxpar._hlo._varying import argument_bits
from jaxpar.explain._evidence import Evidence
from jaxpar.explain._flow import Value, reshaped
from tests.explain._described import array, compiled, mesh

CUBE = _hlo.MeshAxes(names=("a", "b", "c"), sizes=(2, 2, 2))


@pytest.mark.parametrize(
    ("written", "axes"),
    [
        ("replicated", ""),
        ("devices=[2,1,4]<=[8] last_tile_dim_replicate", "a"),
        ("devices=[1,2,4]<=[2,2,2]T(1,0,2) last_tile_dim_replicate", "b"),
        ("devices=[4,1,2]<=[4,2]T(1,0) last_tile_dim_replicate", "ac"),
        ("devices=[2,2,2]<=[4,2]T(1,0)", "abc"),
        ("devices=[2,1,4]0,2,4,6,1,3,5,7 last_tile_dim_replicate", "c"),
        ("devices=[16]<=[16]", None),
        ("devices=[2,1,4]0,2,4,6,1,3,5,9 last_tile_dim_replicate", None),
        ("something={new}", None),
    ],
)
def test_axes_of_an_argument_from_its_line(written, axes):
    op = Op(
        name="p", opcode="parameter", shapes=(Shape(dtype="f32", dims=(8, 8)),), operands=(), inside="0",
        attributes=f", sharding={{{written}}}, metadata={{}}", computation="main", root=False,
    )  # fmt: skip
    expected = None if axes is None else sum(1 << "abc".index(axis) for axis in axes)
    assert argument_bits(op, CUBE) == expected


def evidence(function, on, /, **arguments):
    program = compiled(function, on, **arguments)
    return Evidence(module=_hlo.read(program.text), compiled=program)


def result_axes(function, on, /, **arguments):
    """The axes over which the one result differs."""
    seen = evidence(function, on, **arguments)
    entry = seen.module.program.computations[seen.module.program.entry]
    return seen.varying.axes(seen.varying.bits(entry.ops[entry.root]))


def test_what_spreads_and_what_ends_it():
    on = mesh(data=4, tensor=2)
    batch = array(on, (16, 8), "data")

    def axes(body, spec=P()):
        def step(batch):
            return jax.shard_map(body, mesh=on, in_specs=P("data"), out_specs=spec, check_vma=False)(batch)

        return result_axes(step, on, batch=batch)

    assert axes(jnp.tanh, P("data")) == ("data",)
    assert axes(lambda x: jax.lax.psum(x, "data")) == ()
    assert axes(lambda x: jax.lax.all_gather(x, "data")) == ()
    assert axes(lambda x: jax.lax.psum(x, "tensor"), P("data")) == ("data",)
    index = lambda: jax.lax.axis_index("tensor").astype(jnp.float32)
    assert axes(lambda x: jax.lax.psum(x, "data") * index(), P("tensor")) == ("tensor",)


def test_a_loop_spreads_over_its_variables():
    """Around the loop the second variable takes what the first had."""
    on = mesh(data=8)

    def step(params, batch):
        def body(carry, _):
            first, second, third = carry
            return (first, jnp.tanh(second + first), third * 2), None

        start = (batch, jnp.zeros_like(batch), params)
        return jax.lax.scan(body, start, length=4)[0][1:]

    seen = evidence(step, on, params=array(on, (8, 8)), batch=array(on, (8, 8), "data"))
    entry = seen.module.program.computations[seen.module.program.entry]
    second, third = entry.ops[entry.root].operands
    differs = [seen.varying.axes(seen.varying.bits(entry.ops[name])) for name in (second, third)]
    assert differs == [("data",), ()]


def test_values_are_followed_into_loops_and_out():
    on = mesh(data=8)

    def step(params, batch):
        def body(x, weight):
            return jnp.tanh(x @ weight), None

        return jax.lax.scan(body, batch, params.astype(jnp.bfloat16).astype(jnp.float32))[0]

    seen = evidence(step, on, params=array(on, (3, 8, 8)), batch=array(on, (8, 8), "data"))
    number = [each.path for each in seen.arguments.values()].index("params")
    argument = seen.flow.arguments[number]
    uses = seen.flow.follow(Value(argument.computation, argument.name), reshaped).uses
    assert {op.opcode for op, _ in uses} == {"dynamic-slice"}
    assert {seen.counts[op.computation, op.name] for op, _ in uses} == {3}
