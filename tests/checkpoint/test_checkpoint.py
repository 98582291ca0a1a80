"""Checkpoints: what comes back is what went in, bit for bit, on any mesh; what does not fit is refused."""

import random
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxpar import _tree, checkpoint
from jaxpar._errors import CheckpointError


def make_mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(fsdp=4, tensor=2)


class Model(nnx.Module):
    def __init__(self, rngs, features=8):
        self.up = nnx.Linear(8, features, rngs=rngs)
        self.norm = nnx.BatchNorm(features, rngs=rngs, param_dtype=jnp.bfloat16)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.zz_tied = self.up  # one leaf, seen twice: named by the first path


def sharded_model(mesh, seed, spec, **options):
    model = Model(nnx.Rngs(seed), **options)
    opt = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    for tree in (model, opt):
        leaves = _tree.leaves(tree)
        _tree.replace(
            tree, {path: jax.device_put(x, NamedSharding(mesh, spec)) for path, x in leaves.items() if x.ndim}
        )
    return model, opt


class Loader:
    """The position of a data loader, as a dict."""

    def __init__(self, position=0):
        self.position = position

    def get_state(self):
        return {"position": self.position, "files": ["a", "b"]}

    def set_state(self, state):
        assert state["files"] == ["a", "b"]
        self.position = state["position"]


def bits(x):
    """What must be equal: the bytes of an array, keys and NaN included."""
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return x.dtype, x.shape, np.asarray(x).tobytes()


def assert_same_bits(tree, other):
    leaves, others = _tree.leaves(tree), _tree.leaves(other)
    assert list(leaves) == list(others)
    assert [path for path in leaves if bits(leaves[path]) != bits(others[path])] == []


def message(call, *args, **kwargs):
    with pytest.raises(CheckpointError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_plain_tree_round_trip(mesh, tmp_path):
    def tree(fill):
        put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
        return {
            "w": put(jnp.arange(64.0).reshape(8, 8) + fill, "fsdp", "tensor"),
            "bf16": put(jnp.full((8, 3), 1.1 + fill, jnp.bfloat16), ("fsdp", "tensor")),
            "special": put(jnp.array([np.nan, -0.0, 1e-40, np.inf]) + fill, "fsdp"),
            "int4": jnp.ones(8, jnp.int4) * jnp.int4(fill),
            "flag": jnp.array(fill == 0),
            "key": jax.random.key(fill),
            "keys": put(jax.random.split(jax.random.key(fill, impl="rbg"), 8), "fsdp"),
            "empty": put(jnp.zeros((0, 4)), None, "tensor"),
            "host": np.arange(3) + fill,
            "scalar": np.float64(1 / 3 + fill),
            "counts": [3 + fill, 0.1 + fill, fill == 0],
            "function": jnp.tanh,
            "name": "gelu",
            "nothing": None,
        }

    saved, like = tree(0), tree(1)
    checkpoint.save(tmp_path, 7, saved)
    found = checkpoint.restore(tmp_path, like)

    assert jax.tree.structure(found) == jax.tree.structure(saved)
    assert_same_bits(found, saved)
    assert found["counts"] == [3, 0.1, True]
    assert [type(x) for x in found["counts"]] == [int, float, bool]
    for path, leaf in _tree.leaves(saved).items():
        other = _tree.leaves(found)[path]
        assert type(other) is type(leaf), path
        assert getattr(other, "sharding", None) == getattr(leaf, "sharding", None), path
        assert getattr(other, "committed", None) == getattr(leaf, "committed", None), path
    assert jax.random.key_impl(found["keys"]) == jax.random.key_impl(saved["keys"])


def test_modules_and_optimisers_in_place(mesh, tmp_path):
    saved = sharded_model(mesh, 0, P("fsdp"))
    saved[0].drop(jnp.ones(3))  # the RNG has moved on
    checkpoint.save(tmp_path, 1, saved)
    model, opt = sharded_model(mesh, 1, P("fsdp"))
    found = checkpoint.restore(tmp_path, (model, opt))

    assert found[0] is model
    assert found[1] is opt
    assert model.zz_tied is model.up
    assert_same_bits(found, saved)
    assert int(model.drop.rngs.count[...]) == 1
    assert model.up.kernel[...].sharding == NamedSharding(mesh, P("fsdp"))
    assert type(model.up.kernel) is nnx.Param


def test_one_module_alone(mesh, tmp_path):
    saved, _ = sharded_model(mesh, 0, P("fsdp"))
    checkpoint.save(tmp_path, 1, saved)
    model, _ = sharded_model(mesh, 1, P("fsdp"))
    assert checkpoint.restore(tmp_path, model) is model
    assert_same_bits(model, saved)


def test_graphdef_and_state(tmp_path):
    graphdef, state = nnx.split(Model(nnx.Rngs(0)))
    checkpoint.save(tmp_path, 1, {"state": state, "epoch": 3})
    _, other = nnx.split(Model(nnx.Rngs(1)))
    found = checkpoint.restore(tmp_path, {"state": other, "epoch": 0})
    assert found["epoch"] == 3
    assert_same_bits(nnx.merge(graphdef, found["state"]), nnx.merge(graphdef, state))


def test_abstract_module(mesh, tmp_path):
    """Restored without ever having been initialised."""
    saved, _ = sharded_model(mesh, 0, P("fsdp"))
    checkpoint.save(tmp_path, 1, saved)
    model = nnx.eval_shape(lambda: Model(nnx.Rngs(1)))
    sharding = lambda x: NamedSharding(mesh, P("tensor") if x.ndim else P())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x))
    _tree.replace(model, {path: place(leaf) for path, leaf in _tree.leaves(model).items()})
    checkpoint.restore(tmp_path, model)
    assert_same_bits(model, saved)
    assert model.up.kernel[...].sharding.spec == P("tensor")


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2}, {"data": 1}], ids=str)
def test_onto_another_mesh(mesh, axes, tmp_path):
    saved = sharded_model(mesh, 0, P("fsdp"))
    checkpoint.save(tmp_path, 1, saved)
    other = jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes),
        devices=jax.devices()[: int(np.prod(list(axes.values())))],
    )  # fmt: skip
    found = checkpoint.restore(tmp_path, sharded_model(other, 1, P(None)))
    assert_same_bits(found, saved)
    assert found[0].up.kernel[...].sharding.mesh == other
    again = checkpoint.restore(tmp_path, sharded_model(other, 1, P(tuple(axes))))
    assert_same_bits(again, saved)
    assert again[0].up.kernel[...].sharding.spec == P(tuple(axes))


def test_reads_shards_only(mesh, tmp_path, monkeypatch):
    """Every array is asked of Orbax by shape, dtype and sharding: a whole one is never on the host."""
    saved = sharded_model(mesh, 0, P("fsdp"))
    checkpoint.save(tmp_path, 1, saved)
    asked = {}

    def read(path, targets, real=checkpoint._orbax.read):
        asked.update(targets)
        assert all(isinstance(x, jax.ShapeDtypeStruct) for x in _tree.leaves(like).values())  # let go of
        return real(path, targets)

    monkeypatch.setattr(checkpoint._orbax, "read", read)
    like = sharded_model(mesh, 1, P("fsdp"))
    checkpoint.restore(tmp_path, like)
    assert {path for path, target in asked.items() if isinstance(target, np.ndarray)} == {
        "0.drop.rngs.count", "0.drop.rngs.key", "1.opt_state.0.count", "1.step",
    }  # fmt: skip


def test_donated_arrays_are_gone_before_reading(mesh, tmp_path, monkeypatch):
    saved, _ = sharded_model(mesh, 0, P("fsdp"))
    tree = {"w": jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P("fsdp"))), "key": jax.random.key(3), "n": 1}
    checkpoint.save(tmp_path, 1, (tree, saved))
    like = jax.tree.map(jnp.zeros_like, {**tree, "key": jax.random.key(4)}) | {"n": 0}
    model, _ = sharded_model(mesh, 1, P("fsdp"))

    def read(path, targets, real=checkpoint._orbax.read):
        assert like["w"].is_deleted()
        return real(path, targets)

    monkeypatch.setattr(checkpoint._orbax, "read", read)
    found = checkpoint.restore(tmp_path, (like, model), donate=True)
    assert_same_bits(found[0], tree)
    assert found[0]["n"] == 1
    assert_same_bits(found[1], saved)


def test_objects_with_a_state(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": jnp.ones(3), "data": {"train": Loader(41)}})
    loader = Loader()
    found = checkpoint.restore(tmp_path, {"w": jnp.zeros(3), "data": {"train": loader}})
    assert found["data"]["train"] is loader
    assert loader.position == 41


def test_free_arrays_stay_free(mesh, tmp_path):
    """A counter that was never placed can be used with arrays on a mesh, before and after."""
    placed = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("fsdp")))
    tree = {"count": jnp.int32(3), "w": placed}
    step = jax.jit(lambda tree: tree["w"] * tree["count"].astype(jnp.float32))
    checkpoint.save(tmp_path, 1, tree)
    np.testing.assert_array_equal(step(checkpoint.restore(tmp_path, tree)), step(tree))


def test_async_survives_donation(mesh, tmp_path):
    w = jax.device_put(jnp.full((1024, 256), 3.0), NamedSharding(mesh, P("fsdp")))
    saving = checkpoint.save_async(tmp_path, 5, {"w": w})
    jax.block_until_ready(jax.jit(lambda w: w * 0, donate_argnums=0)(w))
    saving.wait()
    assert saving.done
    assert saving.path == tmp_path / "5"
    like = {"w": jax.ShapeDtypeStruct((1024, 256), jnp.float32, sharding=NamedSharding(mesh, P(None, "tensor")))}
    assert float(checkpoint.restore(tmp_path, like)["w"].min()) == 3


def test_metadata(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": jnp.ones(3)}, metadata={"loss": np.float32(0.5), "tags": ["a"]})
    checkpoint.save(tmp_path, 2, {"w": jnp.ones(3)})
    assert checkpoint.metadata(tmp_path, 1) == {"loss": 0.5, "tags": ["a"]}
    assert checkpoint.metadata(tmp_path) == {}


def test_another_model_is_refused_before_reading(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 3, {"up": jnp.ones((8, 16)), "old": jnp.ones(4), "n": 1, "same": jnp.ones(2)})
    monkeypatch.setattr(checkpoint._orbax, "read", lambda *_: pytest.fail("read"))
    like = {"up": jnp.ones((8, 32)), "new": jnp.ones(4, jnp.bfloat16), "n": 1.0, "same": jnp.ones(2), "data": Loader()}
    assert message(checkpoint.restore, tmp_path, like) == textwrap.dedent(f"""\
        {tmp_path}/3 is a checkpoint of another program: 5 leaves differ (4 in the checkpoint, 5 here).
        new: missing in the checkpoint, (4,) bfloat16 here
        up: (8, 16) float32 in the checkpoint, (8, 32) float32 here
        n: a Python int in the checkpoint, a Python float here
        data: missing in the checkpoint, the state of an object here
        old: (4,) float32 in the checkpoint, nothing here
        Build the model, optimiser and containers as they were when it was saved, or choose another directory.""")


def test_a_refused_module_is_untouched(mesh, tmp_path):
    checkpoint.save(tmp_path, 3, sharded_model(mesh, 0, P("fsdp")))
    model, opt = sharded_model(mesh, 1, P("fsdp"), features=16)
    before = _tree.leaves((model, opt))
    text = message(checkpoint.restore, tmp_path, (model, opt))
    assert "0.up.kernel: (8, 8) float32 in the checkpoint, (8, 16) float32 here\n" in text
    assert "1.opt_state.0.mu.up.kernel: (8, 8) float32 in the checkpoint, (8, 16) float32 here\n" in text
    assert all(leaf is before[path] for path, leaf in _tree.leaves((model, opt)).items())


def test_nothing_is_overwritten(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": jnp.ones(3)})
    assert message(checkpoint.save, tmp_path, 1, {"w": jnp.zeros(3)}) == (
        f"{tmp_path}/1 exists, and a save overwrites nothing. Give another step or directory, or delete it."
    )
    assert checkpoint.restore(tmp_path, {"w": np.zeros(3, np.float32)})["w"].tolist() == [1, 1, 1]


def test_only_complete_checkpoints_count(tmp_path):
    assert checkpoint.steps(tmp_path / "none") == []
    for step in (9, 10):
        checkpoint.save(tmp_path, step, {"w": jnp.ones(3)})
    (tmp_path / "50").mkdir()  # empty
    (tmp_path / "11" / "state").mkdir(parents=True)  # half copied
    (tmp_path / "11" / "_CHECKPOINT_METADATA").write_text((tmp_path / "10" / "_CHECKPOINT_METADATA").read_text())
    (tmp_path / "12.orbax-checkpoint-tmp").mkdir()  # killed while saving
    (tmp_path / "010").mkdir()
    (tmp_path / "13").write_text("a file")
    assert checkpoint.steps(tmp_path) == [9, 10]
    assert checkpoint.latest(tmp_path) == 10
    assert message(checkpoint.restore, tmp_path, {"w": jnp.ones(3)}, step=50) == (
        f"{tmp_path}/50 is damaged.\nan empty directory\nComplete: 9, 10. Copy it again from where it is whole, or "
        "restore without a step, which takes the newest that is valid."
    )
    assert message(checkpoint.restore, tmp_path, {"w": jnp.ones(3)}, step=12) == (
        f"{tmp_path} holds no complete checkpoint of step 12. Complete: 9, 10. "
        "Incomplete, copied or deleted in part: 11, 50. Choose a complete step."
    )
    assert message(checkpoint.restore, tmp_path / "none", {"w": jnp.ones(3)}) == (
        f"{tmp_path}/none holds no complete checkpoint. Complete: none. Check the path, or save first."
    )


def test_prune_and_tidy(tmp_path):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, {"w": jnp.ones(3)})
    (tmp_path / "3").mkdir()
    (tmp_path / "12.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.prune(tmp_path, keep=2) == [1]
    assert checkpoint.steps(tmp_path) == [2, 10]
    assert "keep=0 would delete every checkpoint." in message(checkpoint.prune, tmp_path, keep=0)
    assert checkpoint._steps.tidy(tmp_path) == [3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "2", "3.incomplete"]


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"a.b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}, "a.b: two leaves have this path"),
        ({"a.b": jnp.ones(2), "a": {"b": 3}}, "a.b: two leaves have this path"),
        ({"../../evil": jnp.ones(2)}, "'../../evil': not a legal path"),
        ({"/etc/passwd": jnp.ones(2)}, "'/etc/passwd': not a legal path"),
        ({"a": {"..": jnp.ones(2)}}, "'a...': not a legal path"),
        ({"a\\b": jnp.ones(2)}, "not a legal path"),
        ({"w": jnp.ones(2), "data": iter([1])}, "data: a list_iterator has no get_state and set_state"),
        ({"w": jax.ShapeDtypeStruct((2,), jnp.float32)}, "w: a shape and dtype, without values"),
        ({"n": 3}, "The tree holds no array"),
    ],
)
def test_what_cannot_be_saved(tree, expected, tmp_path):
    assert expected in message(checkpoint.save, tmp_path / "a", 1, tree)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("path", ["mlp/~/linear_0", "blocks-1", "α"])
def test_other_paths_are_legal(path, tmp_path):
    checkpoint.save(tmp_path, 1, {path: jnp.ones(2)})
    assert checkpoint.restore(tmp_path, {path: jnp.zeros(2)})[path].tolist() == [1, 1]


def test_donated_arrays_are_named(tmp_path):
    w = jnp.ones(3)
    jax.block_until_ready(jax.jit(lambda w: w * 0, donate_argnums=0)(w))
    assert "w: deleted, as it was donated to a step" in message(checkpoint.save, tmp_path, 1, {"w": w})


@pytest.mark.parametrize(
    "state",
    [{"at": (1, 2)}, {1: 2}, {"rng": random.Random(0)}, {"raw": b"x"}],
    ids=["tuple", "int key", "object", "bytes"],
)
def test_states_are_json(state, tmp_path):
    loader = Loader()
    loader.get_state = lambda: state
    text = message(checkpoint.save, tmp_path / "a", 1, {"w": jnp.ones(3), "data": loader})
    assert text.startswith("data: ")
    assert "A state is JSON: dicts with string keys, lists (no tuples)" in text


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file is not a directory" in message(checkpoint.save, tmp_path / "file", 1, {"w": jnp.ones(3)})
    assert "Mount the bucket" in message(checkpoint.save, "gs://bucket/run", 1, {"w": jnp.ones(3)})
    assert "step=-1: a step is 0 or more." in message(checkpoint.save, tmp_path, -1, {"w": jnp.ones(3)})


def test_shapes_without_a_sharding(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": jnp.ones(3)})
    text = message(checkpoint.restore, tmp_path, {"w": jax.ShapeDtypeStruct((3,), jnp.float32)})
    assert text.startswith("w: no sharding\nOn 8 devices a jax.ShapeDtypeStruct must say where it goes.")


def test_checkpoints_of_others_are_refused(tmp_path):
    from orbax.checkpoint import v1 as ocp

    ocp.save(str(tmp_path / "1"), {"w": jnp.ones(3)})
    text = message(checkpoint.restore, tmp_path, {"w": jnp.ones(3)})
    assert text == (
        f"{tmp_path} holds no valid checkpoint: step 1 is damaged.\n1: SHA256SUMS: missing\n"
        "Copy one again from where it is whole, or start in another directory."
    )
    text = message(checkpoint.restore, tmp_path, {"w": jnp.ones(3)}, 1)
    assert "was not written by this version of jaxpar.checkpoint: it has no checkpoint.json." in text


def test_no_pickles(mesh, tmp_path):
    checkpoint.save(tmp_path, 1, (*sharded_model(mesh, 0, P("fsdp")), Loader()))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if path.read_bytes()[:2] in (b"\x80\x04", b"\x80\x05")] == []
