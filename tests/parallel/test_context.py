"""Attention over split sequences is attention, whatever the method, the mask and the heads; and what it moves."""

import collections
import functools as ft
import inspect
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxpar as jp
from jaxpar import _blockwise, _context, _kernels, _ring
from jaxpar._errors import ShardingError
from jaxpar._sequence import ContextSplit, balance
from jaxpar.explain._expected import expected as explained
from jaxpar.testing import collectives, compare, pairwise
from tests import _attention as written, _programs as programs

METHODS = {
    "allgather": {"method": "allgather"},
    "ring": {"method": "ring"},
    "ring, in order": {"method": "ring", "balance": "none"},
    "ulysses": {"method": "ulysses"},
    "hybrid": {"method": "hybrid", "heads": 2},
    "hybrid 4, in order": {"method": "hybrid", "heads": 4, "balance": "none"},
}
MESHES = {"context 8": {"context": 8}, "context 4 tensor 2": {"tensor": 2, "context": 4}}
TP = jp.TP(column="w")


def plan_of(strategy, **axes):
    """A plan whose model hardly matters: `w` has the heads that `tensor` splits."""
    return jp.plan(lambda: {"w": jnp.ones((8, 8))}, programs.mesh(**axes), [strategy, TP])


def run(plan, given, **settings):
    """Outputs and gradients on the plan's mesh, in the order of the sequence."""
    batch = plan.batch(given)
    attend = ft.partial(attended, **settings)
    with _context.entered(_context.Region(plan=plan)):
        found = jax.jit(lambda given: written.results(attend, given))(batch)
    return plan.unbatch(found)


def attended(given, *, segments=False, **settings):
    return jp.attention(
        *(given[name] for name in "qkv"),
        positions=given["positions"],
        segments=given["segments"] if segments else None,
        **settings,
    )


@ft.cache
def reference(layout, mask):
    return written.reference(written.inputs(48, written.LAYOUTS[layout]), **written.MASKS[mask])


def check(method, mask, layout, mesh):
    plan = plan_of(jp.CP(**METHODS[method]), **MESHES[mesh])
    found = run(plan, written.inputs(48, written.LAYOUTS[layout]), **written.MASKS[mask])
    table = compare(found, *reference(layout, mask))
    assert table.ok, str(table)


FACTORS = (METHODS, written.MASKS, written.LAYOUTS, MESHES)


def can(method, mask, layout, mesh):
    return method != "hybrid 4, in order" or mesh == "context 8"  # a ring has two groups at least


@pytest.mark.parametrize(("method", "mask", "layout", "mesh"), pairwise(*map(list, FACTORS), where=can)[::2])
def test_it_is_attention(method, mask, layout, mesh):
    """Outputs and gradients; 48 tokens: 6 or 12 on a device, chunks of 3 in zigzag."""
    check(method, mask, layout, mesh)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("method", "mask", "layout", "mesh"), [each for each in itertools.product(*FACTORS) if can(*each)]
)
def test_it_is_attention_everywhere(method, mask, layout, mesh):
    check(method, mask, layout, mesh)


def test_key_heads_that_devices_share():
    """12 query heads of 3 key heads over 4 devices: some serve two key heads with their 3 query heads."""
    given = written.inputs(16, 3, heads=12)
    plan = plan_of(jp.CP(method="ring"), tensor=4, context=2)
    table = compare(run(plan, given), *written.reference(given))
    assert table.ok, str(table)


@pytest.mark.parametrize(
    ("method", "mask", "axes"),
    [
        ("whole", "segments", {"data": 2, "tensor": 2}),
        ("allgather", "segments", {"context": 2}),
        ("ulysses", "window", {"context": 2}),
        ("ring", "segments", {"context": 4}),
        ("ring, in order", "causal", {"context": 2}),
        ("hybrid", "causal", {"context": 4}),
    ],
)
def test_splash_is_attention(method, mask, axes, monkeypatch):
    """The kernel for TPU, interpreted. In zigzag order: masks of its own on each device, halves of keys in a ring."""
    monkeypatch.setattr(_kernels, "_platform_of", lambda mesh: "tpu")
    monkeypatch.setattr(_kernels, "splash_masks", ft.partial(_kernels.splash_masks, interpret=True))
    given = written.inputs(256 * axes.get("context", 1), 2, rows=2, heads=4, features=128)
    plan = plan_of(jp.DP() if method == "whole" else jp.CP(**METHODS[method]), **axes)
    table = compare(run(plan, given, **written.MASKS[mask]), *written.reference(given, **written.MASKS[mask]))
    assert table.ok, str(table)


@pytest.mark.parametrize("change", ["reversed", "a segment that goes on later"])
def test_splash_says_what_it_does_not_know(change):
    """Positions that are not places, or segments in several pieces; padding may be anything."""
    ordered = _blockwise.Marks(jnp.array([[0, 1, 2, 0, 1, 0, 0]]), jnp.array([[1, 1, 1, 2, 2, 0, 0]]))
    assert _kernels._in_order(ordered).all()
    marks = {
        "reversed": _blockwise.Marks(ordered.at[:, ::-1], None),
        "a segment that goes on later": _blockwise.Marks(jnp.arange(4)[None], jnp.array([[1, 1, 2, 1]])),
    }
    assert not _kernels._in_order(marks[change]).any()


# ---- the mistakes that the comparison must notice


def unweighted(one, other):
    return _blockwise.Part((one.out + other.out) / 2, jnp.logaddexp(one.log_sum, other.log_sum))


def a_step_less(step, start, first, end):
    return LOOP(step, start, first, max(end - 1, first))


def by_place(self, queries, keys):
    local = lambda marks: marks._replace(at=jnp.broadcast_to(jnp.arange(marks.at.shape[1]), marks.at.shape))
    return SEES(self, local(queries), local(keys))


LOOP, SEES = _ring._loop, _blockwise.Setting.sees


@pytest.mark.parametrize(
    ("owner", "name", "mistake"),
    [(_blockwise, "merge", unweighted), (_ring, "_loop", a_step_less), (_blockwise.Setting, "sees", by_place)],
    ids=["a wrong merge", "a block that is missing", "a mask by place"],
)
def test_mistakes_are_noticed(owner, name, mistake, monkeypatch):
    given = written.inputs(24, 2)
    plan, expected = plan_of(jp.CP(method="ring"), context=4), written.reference(given)
    monkeypatch.setattr(owner, name, mistake)
    assert not compare(run(plan, given), *expected).ok


# ---- what it moves and holds


def lowered(method, length, *, backward=True, context=8, **settings):
    """The step over `length` tokens, compiled; 8 query heads and 8 key heads of 8 features."""
    plan = plan_of(jp.CP(**METHODS[method]), context=context)
    x = jax.ShapeDtypeStruct((1, length, 8, 8), jnp.float32, sharding=plan.token_sharding)
    at = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=plan.token_sharding)
    total = lambda q, k, v, at: jp.attention(q, k, v, positions=at, **settings).sum()
    step = jax.value_and_grad(total, argnums=(0, 1, 2)) if backward else total
    with _context.entered(_context.Region(plan=plan)):
        return plan, jax.jit(step).lower(x, x, x, at).compile()


HEADS = 48 // 8 * 8 * 8  # elements of one device's K or V
ONCE = 1  # without a loop over layers between, XLA finds that the first transfers of the two passes are one


@pytest.mark.parametrize(
    ("method", "forward", "both"),
    [
        ("ring", {"collective-permute": 7}, {"collective-permute": 2 * 7 + 8 - ONCE}),
        ("allgather", {"all-gather": 2}, {"all-gather": 2, "reduce-scatter": 2}),
        ("ulysses", {"all-to-all": 4}, {"all-to-all": 8}),
    ],
)
def test_what_moves(method, forward, both):
    """A ring sends K and V, one array, p-1 times each way, and their gradients p times; XLA:CPU. `follow` says it."""
    for backward, expected in ((False, forward), (True, both)):
        plan, compiled = lowered(method, 48, backward=backward)
        found, sizes = collections.Counter(), collections.Counter()
        traffic = collectives(compiled, mesh=plan.mesh)
        for match in explained(traffic, plan, num_tokens=48).values():
            assert match.words in (f"attention, {method}", "sum of the loss or of its weight")
        for each in traffic:
            if math.prod(each.shape) >= HEADS:  # not the positions
                assert each.axes == ("context",)
                found[each.kind] += each.count
                sizes[each.kind] += each.count * each.bytes
        assert found == expected
        said = [move for move in plan.follow("attention").moves if backward or move.when.startswith("forward")]
        both_passes = ONCE if backward and method == "ring" else 0
        for kind, size in sizes.items():
            moves = [move for move in said if move.kind == kind]
            assert found[kind] == sum(move.times for move in moves) - both_passes
            assert size == (sum(move.bytes * move.times for move in moves) - both_passes * moves[0].bytes) * HEADS


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_memory_grows_with_the_length_alone(method):
    """Of a device's part: twice the devices hold twice the tokens. Nothing is as large as a device's scores."""

    def temporary(length, context=8):
        _, compiled = lowered(method, length, context=context)
        if context == 8:
            shapes = re.findall(r"[a-z]\w*\[([\d,]+)\]", compiled.as_text())
            assert max(math.prod(map(int, shape.split(","))) for shape in shapes) < length * length // 8
        return compiled.memory_analysis().temp_size_in_bytes

    first, second, third = (temporary(length) for length in (8192, 16384, 32768))
    assert third - second <= 1.1 * 2 * (second - first)
    assert second <= 1.05 * temporary(8192, context=4)


def work_of_devices(strategy, monkeypatch):
    """How many pairs of blocks each of 4 devices computes, of 8 blocks on each side."""
    counts = np.zeros(4, int)
    scores = _blockwise._scores

    def counted(*args):
        jax.debug.callback(lambda at: np.add.at(counts, int(at), 1), jax.lax.axis_index("context"))
        return scores(*args)

    monkeypatch.setattr(_blockwise, "_scores", counted)
    monkeypatch.setattr("jaxpar._kernels.BLOCK", 4)
    plan, given = plan_of(strategy, context=4), written.inputs(32, 8, rows=1)
    batch = plan.batch(given)
    with _context.entered(_context.Region(plan=plan)):
        jax.block_until_ready(jax.jit(attended)(batch))
    jax.effects_barrier()
    return counts.tolist()


@pytest.mark.parametrize("method", ["allgather", "ring"])
def test_zigzag_gives_every_device_the_same_work(method, monkeypatch):
    """In order the last device has 15 pairs of 36, and 4 devices the speed of 36/15; in zigzag each has 9."""
    assert work_of_devices(jp.CP(method=method, balance="none"), monkeypatch) == [3, 7, 11, 15]
    assert work_of_devices(jp.CP(method=method), monkeypatch) == [9, 9, 9, 9]


def test_balance_is_arithmetic():
    for size in (2, 4, 8):
        split = ContextSplit(axis="context", size=size, method="ring")
        assert math.isclose(balance(split), size / (2 * size - 1))
        assert balance(ContextSplit(axis="context", size=size, method="ring", zigzag=True)) == 1


# ---- batches


def test_a_batch_is_brought_in_order_and_back():
    given = written.inputs(16, 1) | {"sample": np.arange(2)}
    plan = plan_of(jp.CP(), context=4)
    batch = plan.batch(given)
    assert batch["q"].sharding.spec == P(None, "context")
    assert batch["sample"].sharding.spec == P()
    order = [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
    np.testing.assert_array_equal(batch["positions"][0], order)
    np.testing.assert_array_equal(batch["q"], given["q"][:, order])
    np.testing.assert_array_equal(plan.unbatch(batch["q"]), given["q"])
    np.testing.assert_array_equal(plan_of(jp.CP(balance="none"), context=4).batch(given)["q"], given["q"])


def test_a_loader_does_as_the_plan():
    class Rows:
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return {"tokens": np.arange(16, dtype=np.int32) + index, "positions": np.arange(16, dtype=np.int32)}

    plan = plan_of(jp.CP(), context=4)
    loader = jp.data.Loader(Rows(), batch_size=2, seed=None)
    with loader.to(plan) as batches:
        batch = next(iter(batches))
    expected = plan.batch(next(iter(jp.data.Loader(Rows(), batch_size=2, seed=None))))
    for name in expected:
        assert batch[name].sharding == expected[name].sharding
        np.testing.assert_array_equal(batch[name], expected[name])


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"x": np.ones((2, 12)), "positions": np.ones((2, 12))}, "12 tokens.*multiple of 8. Use 8 or 16"),
        ({"x": np.ones((2, 16))}, "no field 'positions'"),
        ({"positions": np.ones((2, 16)), "image": np.ones((2, 3))}, r"image: 3, positions: 16.*CP\(whole="),
    ],
)
def test_a_batch_that_does_not_fit(batch, said):
    with pytest.raises(ShardingError, match=said):
        plan_of(jp.CP(), context=4).batch(batch)
    plan_of(jp.CP(balance="none", whole=["image"]), context=4).batch(batch)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "rings"}, "'allgather', 'ring', 'ulysses', 'hybrid'"),
        ({"balance": "striped"}, "'zigzag' or 'none'"),
        ({"method": "ulysses", "balance": "zigzag"}, "no effect"),
        ({"method": "hybrid"}, "heads=None"),
        ({"heads": 2}, "heads=2 has no effect"),
        ({"reduce": "once"}, "'microbatch' or 'step'"),
    ],
)
def test_settings_that_do_not_go_together(settings, said):
    with pytest.raises(ShardingError, match=said):
        inspect.unwrap(jp.CP.__init__)(object.__new__(jp.CP), **settings)


def test_a_hybrid_is_a_ring_of_groups():
    assert plan_of(jp.CP(method="hybrid", heads=2), context=4).context.heads == 2
    for heads in (3, 4):
        with pytest.raises(ShardingError, match=f"heads={heads} and axis 'context' of size 4"):
            plan_of(jp.CP(method="hybrid", heads=heads), context=4)


def test_heads_that_cannot_be_split():
    given = written.inputs(16, 3, heads=6)
    with pytest.raises(ShardingError, match="6 query heads and 3 key heads"):
        run(plan_of(jp.CP(method="ulysses"), context=4), given)


def test_zigzag_wants_positions():
    given = written.inputs(16, 8)
    plan = plan_of(jp.CP(), context=4)
    attend = lambda given, **settings: jp.attention(given["q"], given["k"], given["v"], **settings)
    with _context.entered(_context.Region(plan=plan)):
        with pytest.raises(ShardingError, match="zigzag order"):
            jax.eval_shape(attend, plan.batch(given))
        jax.eval_shape(ft.partial(attend, causal=False), plan.batch(given))
    own = lambda given: attend(given, positions=jnp.broadcast_to(jnp.arange(16), given["positions"].shape))
    with pytest.raises(jp.StepError, match="come from no argument of this step"):
        plan.jit(own).lower(plan.batch(given))
    plan.jit(lambda given: attend(given, positions=given["positions"] * 2)).lower(plan.batch(given))
    in_order = plan_of(jp.CP(balance="none"), context=4)
    with _context.entered(_context.Region(plan=in_order)):
        found = jax.jit(attend)(in_order.batch(given))
    np.testing.assert_allclose(found, written.reference(given)[0]["out"], atol=1e-5)


@pytest.mark.parametrize("change", ["none", "a mean", "random numbers", "a convolution"])
def test_a_loss_that_is_no_sum_over_tokens(change):
    """`reduce="step"` runs it on parts of sequences: what is seen to be none is refused."""
    plan = plan_of(jp.CP(reduce="step"), context=4)

    def loss(params, batch):
        x = jp.constrain(batch["q"][..., 0], "batch", "seq", "embed")
        y = jnp.square(x @ params["w"])
        if change == "random numbers":
            y *= jax.random.uniform(jax.random.fold_in(jax.random.key(0), batch["sample"][0]), y.shape)
        if change == "a convolution":
            y = jax.lax.conv_general_dilated(
                y, params["w"][None, :], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )
        return y.mean() if change == "a mean" else (y.sum(), jnp.float32(1) * batch["positions"].shape[1])

    given = written.inputs(16, 1, rows=8) | {"sample": np.arange(8)}
    step = plan.jit(jp.value_and_grad(loss, accumulate=2))
    lower = lambda: step.lower(plan.init(), plan.batch(given))
    if change == "none":
        lower()
        assert "one reduction a step over context" in step.notes[-1]
    else:
        with pytest.raises(jp.StepError, match=r"CP\(reduce='step'\) runs the loss"):
            lower()


def test_a_plan_says_it():
    plan = plan_of(jp.CP(method="ring"), context=8)
    (note,) = plan.notes
    assert "context=8 in zigzag order" in note
    assert "K and V go round context in 7 steps" in note
    assert str(plan.follow("attention")).startswith("attention  ring over context=8, in zigzag order")
    assert not plan_of(jp.CP(), data=1, tensor=8).follow("attention").moves
    assert jp.Plan.from_json(plan.to_json()).context == plan.context
    assert plan.diff(plan_of(jp.CP(), context=8))[0].startswith("context: ")
    assert plan_of(jp.CP(method="ring"), data=1, tensor=8).context is None


def test_a_model_that_attends_in_another_way_is_told(caplog):
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            x = jp.constrain(self.w(x), "batch", "seq", "embed")
            return jax.nn.softmax(x @ x.mT) @ x

    plan = jp.plan(Model, programs.mesh(context=4), [jp.CP(balance="none")])
    plan.jit(lambda model, x: model(x))(plan.init(), plan.batch(np.ones((2, 8, 8), np.float32)))
    assert "nothing here calls jp.attention" in caplog.text
