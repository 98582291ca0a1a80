"""A checkpoint under logical names: scanned or not, of this dtype or that, whole or in part."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxpar as jp
from jaxpar import _tree, checkpoint
from jaxpar._errors import CheckpointError
from jaxpar.checkpoint._about import Leaf
from jaxpar.checkpoint._match import pair

NUM = 3


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Single(nnx.Module):
    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Linear(4, 8, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(NUM)])

    def __call__(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


class Scanned(Single):
    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Linear(4, 8, rngs=rngs)
        self.blocks = jp.Stack(Block, NUM, rngs=rngs)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def make(kind, seed, mesh):
    """A model and its optimiser: matrices split over both axes, the rest whole; counters placed nowhere."""
    model = kind(seed)
    opt = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    matrix = P("fsdp", "tensor")
    for tree in (model, opt):
        leaves = _tree.leaves(tree)
        specs = {path: matrix if leaf.ndim == 2 else P() for path, leaf in leaves.items() if leaf.ndim}
        specs |= {
            path: P(None, *matrix) if leaf.ndim == 3 else P() for path, leaf in leaves.items() if ".each." in path
        }
        _tree.replace(tree, {path: jax.device_put(leaves[path], NamedSharding(mesh, specs[path])) for path in specs})
    grads = jax.tree.map(lambda x: x * 0.1, nnx.state(model, nnx.Param))
    opt.update(model, grads)  # moments that differ between layers
    return model, opt


def layers(tree):
    """All leaves in the layout of single layers."""
    found = {}
    for path, leaf in _tree.leaves(tree).items():
        value = np.asarray(leaf)
        if ".each." in path:
            found |= {path.replace(".each.", f".{index}."): value[index] for index in range(NUM)}
        else:
            found[path] = value
    return found


def assert_same(tree, other):
    left, right = layers(tree), layers(other)
    assert left.keys() == right.keys()
    assert [path for path in left if left[path].tobytes() != right[path].tobytes()] == []


@pytest.mark.parametrize(("one", "other"), [(Single, Scanned), (Scanned, Single)], ids=["stack", "cut"])
def test_scanned_and_single_layers(one, other, mesh, tmp_path):
    """Parameters and moments, bit for bit, onto the shardings of the reader; and it computes the same."""
    saved = make(one, 0, mesh)
    checkpoint.save(tmp_path, 1, saved)
    found = make(other, 1, mesh)
    before = {path: leaf.sharding for path, leaf in _tree.leaves(found).items()}
    checkpoint.restore(tmp_path, found)
    assert_same(found, saved)
    assert {path: leaf.sharding for path, leaf in _tree.leaves(found).items()} == before
    x = jnp.ones((2, 4))
    np.testing.assert_allclose(found[0](x), saved[0](x), rtol=1e-5, atol=1e-6)


def test_a_layer_at_a_time(mesh, tmp_path, monkeypatch):
    """What is asked of Orbax at once, beside what has the same layout: one layer of all stacks, or one stack."""
    asked = []
    real = checkpoint._orbax.read
    monkeypatch.setattr(
        checkpoint._orbax, "read", lambda path, targets: asked.append(dict(targets)) or real(path, targets)
    )
    single, scanned = make(Single, 0, mesh), make(Scanned, 0, mesh)
    checkpoint.save(tmp_path, 1, single)
    checkpoint.restore(tmp_path, scanned)
    in_blocks = [{path for path in targets if "blocks" in path} for targets in asked]
    assert [len(paths) for paths in in_blocks] == [0, 12, 12, 12]  # 4 parameters and their two moments
    kernel = asked[1]["0.blocks.0.up.kernel"]
    assert (kernel.shape, kernel.sharding.spec) == ((8, 16), P("fsdp", "tensor"))

    asked.clear()
    checkpoint.save(tmp_path, 2, scanned)
    checkpoint.restore(tmp_path, single)
    assert [len(targets) for targets in asked[1:]] == [1] * 12
    kernels = [targets["0.blocks.each.up.kernel"] for targets in asked if "0.blocks.each.up.kernel" in targets]
    assert [(x.shape, x.sharding.spec) for x in kernels] == [((NUM, 8, 16), P(None, "fsdp", "tensor"))]


def test_a_stack_split_by_layers(mesh, tmp_path):
    """The dim of layers itself lies over an axis."""
    layers = [{"w": jnp.full((8, 4), index + 1.0), "b": np.full(3, index)} for index in range(4)]
    checkpoint.save(tmp_path, 1, {"blocks": layers})
    sharding = NamedSharding(mesh, P("fsdp", "tensor"))
    like = {"blocks": {"w": jax.device_put(jnp.zeros((4, 8, 4)), sharding), "b": np.zeros((4, 3), int)}}
    found = checkpoint.restore(tmp_path, like)["blocks"]
    assert found["w"].sharding == sharding
    assert found["w"][:, 0, 0].tolist() == [1, 2, 3, 4]
    assert found["b"][:, 0].tolist() == [0, 1, 2, 3]


def test_fsdp_stacks_what_data_parallel_does_not(tmp_path):
    """The same model under two strategies."""
    single = jp.plan(lambda: Single(0), jp.mesh(data=8), [jp.DP()]).init()
    checkpoint.save(tmp_path, 1, single)
    stacked = jp.plan(lambda: Single(1), jp.mesh(fsdp=8), [jp.FSDP(blocks="blocks.*", min_bytes=256)]).init()
    checkpoint.restore(tmp_path, stacked)
    assert_same(stacked, single)


def array(*shape, kind="float32"):
    return Leaf(kind=kind, shape=shape)


@pytest.mark.parametrize(
    ("saved", "here", "lines"),
    [
        ({"l_0.w": array(2), "l_1.w": array(2)}, {"l.w": array(2, 2)}, []),  # Linen
        ({"b.0.w": array(2), "b.1.w": array(2)}, {"b.w": array(2, 2)}, []),
        ({"b.each.w": array(2, 2)}, {"b.0.w": array(2), "b.1.w": array(2)}, []),
        ({"b.each.table": array(5)}, {"b.0.table": array(5)}, []),  # shared by all layers
        ({"b.0.table": array(5)}, {"b.each.table": array(5)}, []),
        ({"b.0.w": array(2), "b.1.w": array(2)}, {"b.w": array(3, 2)}, ["b.w", "b.0.w", "b.1.w"]),  # one too few
        ({"b.0.w": array(2), "b.1.w": array(2)}, {"b.w": array(1, 2)}, ["b.w", "b.0.w", "b.1.w"]),  # one too many
        ({"b.0.w": array(2), "b.1.w": array(3)}, {"b.w": array(2, 2)}, ["b.w", "b.0.w", "b.1.w"]),
        ({"b.0.w": array(2), "b.1.w": array(2)}, {"b.w": array(2, 2, kind="int32")}, ["b.w", "b.0.w", "b.1.w"]),
        ({"b.w": array(2, 2)}, {"b.0.w": array(2)}, ["b.0.w", "b.w"]),
        ({"b.0.w": Leaf(kind="a Python int")}, {"b.w": array(1)}, ["b.w", "b.0.w"]),
    ],
)
def test_what_is_a_stack_of_what(saved, here, lines):
    assert [line.split(":")[0] for line in pair(saved, here)[1]] == lines


def test_parameters_alone(mesh, tmp_path):
    saved = make(Single, 0, mesh)
    checkpoint.save(tmp_path, 1, saved)
    model, _ = make(Scanned, 1, mesh)
    assert checkpoint.restore(tmp_path, model, part="0") is model
    assert_same(model, saved[0])
    kernel = checkpoint.restore(tmp_path, np.zeros((4, 8), np.float32), part="0.embed.kernel")
    np.testing.assert_array_equal(kernel, np.asarray(saved[0].embed.kernel[...]))
    some = checkpoint.restore(tmp_path, ({"embed": {"bias": jnp.ones(8)}},), part="")
    assert some[0]["embed"]["bias"].tolist() == [0] * 8


def test_parts_that_are_not_there(mesh, tmp_path):
    checkpoint.save(tmp_path, 1, {"model": {"w": jnp.ones(3)}, "epoch": 3})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore(tmp_path, {"w": jnp.ones(3)}, part="modle")
    assert str(caught.value) == (
        f"{tmp_path}/1 has no part 'modle'. Did you mean 'model'? At its top it has epoch, model."
    )
    with pytest.raises(CheckpointError, match=r"\nb: missing in the checkpoint, \(3,\) float32 here\n"):
        checkpoint.restore(tmp_path, {"w": jnp.ones(3), "b": jnp.ones(3)}, part="model")


def test_another_dtype(mesh, tmp_path):
    """Rounded if asked, and only from floating point to floating point."""
    sharding = NamedSharding(mesh, P("fsdp"))
    values = jax.device_put(jnp.linspace(0, 1, 64).reshape(8, 8), sharding)
    checkpoint.save(tmp_path, 1, {"w": values, "n": jnp.arange(3)})
    like = {"w": jax.device_put(jnp.zeros((8, 8), jnp.bfloat16), sharding), "n": jnp.arange(3)}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore(tmp_path, like)
    assert str(caught.value) == (
        f"{tmp_path}/1 is a checkpoint of another program: 1 leaf differs (2 in the checkpoint, 2 here).\n"
        "w: (8, 8) float32 in the checkpoint, (8, 8) bfloat16 here\n"
        "Only floating-point dtypes differ: cast=True rounds what was saved to the dtypes here."
    )
    found = checkpoint.restore(tmp_path, like, cast=True)
    assert (found["w"].dtype, found["w"].sharding) == (jnp.bfloat16, sharding)
    np.testing.assert_array_equal(np.asarray(found["w"]), np.asarray(values.astype(jnp.bfloat16)))
    layers = [jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=NamedSharding(mesh, P()))] * 8
    cut = checkpoint.restore(tmp_path, {"w": layers, "n": jnp.arange(3)}, cast=True)["w"]
    np.testing.assert_array_equal(np.stack(cut), np.asarray(values.astype(jnp.bfloat16)))
    with pytest.raises(CheckpointError, match=r"n: \(3,\) int32 in the checkpoint, \(3,\) float32 here"):
        checkpoint.restore(tmp_path, {**like, "n": jnp.ones(3)}, cast=True)
