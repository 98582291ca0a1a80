"""Tensors of other programs: any layout there and back, piece by piece, and what is refused before a value is read."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxpar import CheckpointError, checkpoint
from jaxpar.checkpoint import Tensor, load_safetensors, save_safetensors

# What each leaf is in NumPy, made of a tensor named after it: shape of the leaf, its layout, and how a file has it.
SHAPE = (3, 2, 4, 8)
LAYOUT = {
    "plain": Tensor("plain"),
    "turned": Tensor("turned.{}", transpose=(2, 0, 1)),
    "experts": Tensor("block.{}.expert.{}.w", transpose=(1, 0)),
    "heads": Tensor("heads.{}.weight", transpose=(1, 2, 0), merged=(2, 1)),
    "padded": Tensor("padded.{}", merged=(0, 1, 1, 0, 1)),
    "q": Tensor("fused.{}", transpose=(1, 2, 0), part=(0, 0, 8)),
    "k": Tensor("fused.{}", transpose=(1, 2, 0), part=(0, 8, 16)),
}


def in_files(leaves):
    found = {"plain": leaves["plain"]}
    for layer in range(3):
        found[f"turned.{layer}"] = leaves["turned"][layer].transpose(1, 2, 0)
        for expert in range(2):
            found[f"block.{layer}.expert.{expert}.w"] = leaves["experts"][layer, expert].T
        found[f"heads.{layer}.weight"] = leaves["heads"][layer].transpose(2, 0, 1).reshape(16, 4)
        found[f"padded.{layer}"] = leaves["padded"][layer][None, :, :, None]
        fused = [leaves[name][layer].transpose(2, 0, 1) for name in ("q", "k")]
        found[f"fused.{layer}"] = np.concatenate(fused)
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def mesh():
    return jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)


def placed(value, *spec):
    return jax.device_put(value, NamedSharding(mesh(), P(*spec)))


@pytest.fixture
def leaves():
    random = np.random.default_rng(0)
    return {name: random.normal(size=SHAPE).astype(np.float32) for name in LAYOUT}


SPECS = [(), (None, None, "a", "b"), (None, "b", None, ("c", "a")), (None, ("a",), "b", "c")]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_any_layout_there_and_back(spec, leaves, tmp_path):
    """Against NumPy and the format's own library, on pieces of every dim."""
    expected = in_files(leaves)
    save_safetensors(
        tmp_path / "saved", {name: placed(leaf, *spec) for name, leaf in leaves.items()}, LAYOUT, file_bytes=900
    )
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 900 + 2_000 for file in files)
    written = {name: value for file in files for name, value in safetensors.numpy.load_file(file).items()}
    assert {name: value.tolist() for name, value in written.items()} == {
        name: value.tolist() for name, value in expected.items()
    }
    like = {name: placed(np.zeros(SHAPE, np.float32), *spec) for name in LAYOUT}
    back = load_safetensors(tmp_path / "saved", like, LAYOUT)
    for name, leaf in leaves.items():
        assert back[name].sharding == like[name].sharding
        assert (np.asarray(back[name]) == leaf).all(), name


def test_scalars_and_empty_arrays_and_dtypes(tmp_path):
    tree = {"n": jnp.int32(7), "none": jnp.zeros((0, 3)), "half": jnp.arange(4, dtype=jnp.bfloat16)}
    layout = {name: Tensor(name) for name in tree}
    save_safetensors(tmp_path / "saved", tree, layout)
    assert checkpoint.tensors(tmp_path / "saved") == {
        "n": ((), "int32"), "none": ((0, 3), "float32"), "half": ((4,), "bfloat16")
    }  # fmt: skip
    back = load_safetensors(tmp_path / "saved", jax.tree.map(jnp.zeros_like, tree), layout)
    assert (int(back["n"]), back["none"].shape, back["half"].tolist()) == (7, (0, 3), [0.0, 1.0, 2.0, 3.0])


def test_dtypes_are_kept_unless_asked(tmp_path):
    save_safetensors(tmp_path / "half", {"w": jnp.full(3, 1 / 3)}, {"w": Tensor("w")}, dtype="bfloat16")
    like = {"w": jnp.zeros(3)}
    with pytest.raises(CheckpointError, match=r"w: \(3,\) bfloat16 in the files, \(3,\) float32 here[^\0]*cast=True"):
        load_safetensors(tmp_path / "half", like, {"w": Tensor("w")})
    back = load_safetensors(tmp_path / "half", like, {"w": Tensor("w")}, cast=True)
    assert back["w"].dtype == jnp.float32
    assert back["w"][0] == jnp.bfloat16(1 / 3).astype(jnp.float32)


def test_one_piece_is_in_memory(tmp_path):
    """Saving and loading 16 MiB over eight devices takes no more host memory than two of the eight pieces."""
    tree = {"w": placed(np.ones((4, 1024, 1024), np.float32), None, ("a", "b"), "c")}
    layout = {"w": Tensor("layers.{}.w", transpose=(1, 0))}
    tracemalloc.start()
    save_safetensors(tmp_path / "saved", tree, layout)
    saving = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert saving < 2 * 2 * 1024**2


def test_everything_that_differs_is_named_at_once(tmp_path):
    layout = {name: Tensor(f"their.{name}") for name in ("a", "b", "c")}
    save_safetensors(tmp_path / "saved", {name: jnp.ones((2, 3)) for name in "abc"}, layout)
    other = {"a": Tensor("their.a"), "b": Tensor("their.b", transpose=(1, 0)), "d": Tensor("their.d")}
    with pytest.raises(CheckpointError) as found:
        load_safetensors(tmp_path / "saved", {name: jnp.zeros((2, 3)) for name in other}, other)
    assert str(found.value).splitlines()[1:-1] == [
        "their.b: (2, 3) float32 in the files, (3, 2) float32 here (b)",
        "their.d: missing in the files, (2, 3) float32 here (d)",
        "their.c: (2, 3) float32 in the files, nothing here",
    ]
    back = load_safetensors(tmp_path / "saved", {"a": jnp.zeros((2, 3))}, {"a": other["a"]}, ignore=["their.[bc]"])
    assert back["a"].sum() == 6


@pytest.mark.parametrize(
    ("layout", "line"),
    [
        ({"w": Tensor("w"), "x": Tensor("x")}, "x: in the layout, and not here"),
        ({}, "w: (4, 6) float32, which the layout lacks"),
        ({"w": Tensor("{}.{}.{}")}, "w: the name spells out 3 dims, and the leaf has 2"),
        ({"w": Tensor("w", transpose=(0, 2))}, "w: transpose=(0, 2) is no order of 2 dims"),
        ({"w": Tensor("w", merged=(2, 1))}, "w: merged=(2, 1) is about 3 dims of 2"),
        ({"w": Tensor("w", part=(0, 2, 6))}, "w: rows 2 to 6 of dim 0, after row 0, for a leaf with 4, from w"),
    ],
)
def test_a_layout_that_does_not_fit(layout, line, tmp_path):
    with pytest.raises(CheckpointError) as found:
        save_safetensors(tmp_path / "saved", {"w": jnp.zeros((4, 6))}, layout)
    assert line in str(found.value).splitlines()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ".hidden.safetensors", "w.bin"]
)
def test_an_index_cannot_lead_elsewhere(name, tmp_path):
    home = tmp_path / "home"
    save_safetensors(home, {"w": jnp.ones(3)}, {"w": Tensor("w")})
    (home / "model.safetensors").rename(tmp_path / "model.safetensors")
    (home / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match="not the name of a safetensors file beside the index"):
        load_safetensors(home, {"w": jnp.zeros(3)}, {"w": Tensor("w")})


def test_pickles_are_refused_by_name(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickles, which can run any code"):
        load_safetensors(tmp_path, {"w": jnp.zeros(3)}, {"w": Tensor("w")})


@pytest.mark.parametrize("fault", ["cut", "a flipped bit", "no file", "no index"])
def test_damage_is_found_before_a_value_is_read(fault, tmp_path):
    tree = {name: jnp.ones(300) for name in "ab"}
    layout = {name: Tensor(name) for name in tree}
    save_safetensors(tmp_path / "saved", tree, layout, file_bytes=1200)
    file = tmp_path / "saved" / "model-00002-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    if fault == "cut":
        file.write_bytes(data[:-8])
    elif fault == "a flipped bit":
        data[-5] ^= 1
        file.write_bytes(data)
    elif fault == "no file":
        file.unlink()
    else:
        (tmp_path / "saved" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"ownload it again|damaged|incomplete"):
        load_safetensors(tmp_path / "saved", tree, layout)
    assert tree["a"].sum() == 300


def test_what_exists_is_not_overwritten(tmp_path):
    save_safetensors(tmp_path / "saved", {"w": jnp.ones(3)}, {"w": Tensor("w")}, beside={"config.json": {"a": 1}})
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == {"a": 1}
    with pytest.raises(CheckpointError, match="exists, and nothing is overwritten"):
        save_safetensors(tmp_path / "saved", {"w": jnp.ones(3)}, {"w": Tensor("w")})
    for name in ("../config.json", "model.safetensors.index.json", "weights.bin"):
        with pytest.raises(CheckpointError, match="not a name for a JSON file of yours"):
            save_safetensors(tmp_path / "new", {"w": jnp.ones(3)}, {"w": Tensor("w")}, beside={name: {}})
