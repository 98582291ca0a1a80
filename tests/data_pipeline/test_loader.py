"""A batch is a function of (source, batch size, seed, step): on any process, after any resume."""

import json

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import PartitionSpec as P

import jaxpar as jp
from jaxpar._errors import DataError
from jaxpar.data import Loader, Source, pad_batch, tokenise
from jaxpar.data._loader import _part_of


def samples(size):
    return [{"x": np.array([index, index]), "y": np.float32(index)} for index in range(size)]


def same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    files = [folder / f"{index}.txt" for index in range(9)]
    for index, file in enumerate(files):
        file.write_text(f"document {index}: " + "some text " * (5 + index))
    return tokenise(files, folder / "cache")


def test_fields(tokens):
    batch = Loader(tokens, batch_size=4, seq_len=16).batch(0)
    assert {name: (str(field.dtype), field.shape) for name, field in batch.items()} == {
        "tokens": ("int32", (4, 16)),
        "labels": ("int32", (4, 16)),
        "positions": ("int32", (4, 16)),
        "segments": ("int32", (4, 16)),
        "weights": ("float32", (4, 16)),
        "sample": ("int32", (4,)),
    }


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 20), batch_size=st.integers(1, 9), seed=st.none() | st.integers(0, 99))
def test_every_epoch_gives_every_sample_once(size, batch_size, seed):
    loader = Loader(samples(size), batch_size=batch_size, seed=seed)
    num_steps = -(-3 * size // batch_size)
    line = np.concatenate([loader.batch(step)["x"][:, 0] for step in range(num_steps)])[: 3 * size]
    for epoch in line.reshape(3, size):
        assert sorted(epoch.tolist()) == list(range(size))


def test_epochs_and_seeds_differ():
    loader = Loader(samples(50), batch_size=50, seed=1)
    orders = [loader.batch(step)["y"].tolist() for step in range(3)] + [
        Loader(samples(50), batch_size=50, seed=2).batch(0)["y"].tolist()
    ]
    assert len({tuple(order) for order in orders}) == 4
    assert list(range(50)) not in orders


@pytest.mark.parametrize("epochs", [None, 2], ids=["endless", "two epochs"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_processes_make_their_parts_of_one_batch(count, epochs):
    """No row twice, none missing, in the order of one process: also across epochs and in a last batch with padding."""
    settings = {"batch_size": 12, "seed": 7, "epochs": epochs}
    whole = Loader(samples(29), **settings)
    parts = [Loader(samples(29), process_index=index, process_count=count, **settings) for index in range(count)]
    assert whole.num_steps == (5 if epochs else None)
    for step in range(5):
        batches = [part.batch(step) for part in parts]
        assert {batch["x"].shape for batch in batches} == {(12 // count, 2)}
        same({name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}, whole.batch(step))


def test_each_process_reads_only_its_part():
    read = []

    class Reading:
        def __len__(self):
            return 100

        def __getitem__(self, index):
            read.append(index)
            return {"x": np.array(index)}

    loader = Loader(Reading(), batch_size=10, seed=None, process_index=1, process_count=2)
    read.clear()
    loader.batch(3)
    assert read == [35, 36, 37, 38, 39]


def test_sample_ids_differ_within_a_batch():
    """Though the batch holds samples of several epochs, and a run has more places than int32."""
    loader = Loader(samples(3), batch_size=8, seed=0)
    assert loader.batch(1)["sample"].tolist() == list(range(8, 16))
    late = loader.batch(2**31 // 8)["sample"]
    assert late.dtype == np.int32
    assert late.tolist() == list(range(8))


def test_resume_equals_uninterrupted(tokens):
    def loader():
        return Loader(tokens, batch_size=5, seq_len=16, seed=3)

    whole = loader()
    expected = [next(whole) for _ in range(20)]
    first = loader()
    for _ in range(7):
        next(first)
    second = loader()
    second.set_state(json.loads(json.dumps(first.get_state())))
    for batch in expected[7:]:
        same(next(second), batch)
    assert second.get_state() == whole.get_state()


def test_state_on_other_processes():
    """The state says nothing about processes: four go on where two stopped."""
    before = Loader(samples(29), batch_size=12, process_index=1, process_count=2)
    next(before), next(before)
    after = Loader(samples(29), batch_size=12, process_index=3, process_count=4)
    after.set_state(before.get_state())
    same(next(after), Loader(samples(29), batch_size=12, process_index=3, process_count=4).batch(2))


def test_state_of_another_loader(tokens):
    loader = Loader(tokens, batch_size=4, seq_len=16, seed=0)
    state = Loader(tokens.split(0.3).train, batch_size=8, seq_len=32, seed=1).get_state()
    with pytest.raises(DataError) as error:
        loader.set_state(state)
    assert str(error.value) == (
        "The data position in the checkpoint is not one of this loader:\n"
        f"source: {state['source']!r} in the checkpoint, {loader.get_state()['source']!r} here\n"
        "batch_size: 8 in the checkpoint, 4 here\n"
        "seed: 1 in the checkpoint, 0 here\n"
        "Resume with the data and settings of the run, or start a new run in another directory."
    )
    assert loader.step == 0


@pytest.mark.parametrize("state", [{}, {"step": -1}, {"step": "3"}, {"step": 4}, {"step": True}])
def test_damaged_state(state):
    loader = Loader(samples(6), batch_size=2, epochs=1)
    with pytest.raises(DataError, match=r"step: .* in the checkpoint, from 0 to 3 here"):
        loader.set_state({**loader.get_state(), "step": None, **state})


def test_numpy_settings_make_a_json_state():
    loader = Loader(samples(6), batch_size=np.int64(2), seed=np.uint32(5))
    assert json.loads(json.dumps(loader.get_state())) == loader.get_state()


def test_one_pass_ends_with_padding_and_starts_over():
    loader = Loader(samples(5), batch_size=2, seed=None, epochs=1)
    batches = list(loader)
    assert [batch["y"].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 0]]
    assert [batch["weights"].tolist() for batch in batches] == [[1, 1], [1, 1], [1, 0]]
    assert loader.get_state()["step"] == 0
    assert len(list(loader)) == 3


def test_a_weighted_mean_over_one_pass_is_the_true_one(tokens):
    """Every token that can be predicted counts once, whatever the batch size."""
    sums = []
    for batch_size in (1, 4, 7):
        batches = list(Loader(tokens, batch_size=batch_size, seq_len=16, seed=None, epochs=1))
        assert {batch["tokens"].shape for batch in batches} == {(batch_size, 16)}
        weights = np.concatenate([batch["weights"] for batch in batches])
        labels = np.concatenate([batch["labels"] for batch in batches])
        sums.append((weights.sum(), (weights * labels).sum()))
    assert sums[0][0] == tokens.num_tokens - tokens.num_documents
    assert len(set(sums)) == 1


def test_beyond_the_end():
    loader = Loader(samples(5), batch_size=2, epochs=1)
    with pytest.raises(DataError, match="There is no batch 3: steps go from 0 to 2, the end of 1 epochs"):
        loader.batch(3)
    with pytest.raises(DataError, match="There is no batch -1: steps go from 0 on"):
        Loader(samples(5), batch_size=2).batch(-1)


def test_a_grain_dataset_is_a_source():
    source = grain.MapDataset.range(10).map(lambda index: {"x": np.array(index * index)})
    assert isinstance(source, Source)
    loader = Loader(source, batch_size=5, seed=None)
    assert loader.batch(1)["x"].tolist() == [25, 36, 49, 64, 81]


def test_pad_batch():
    padded = pad_batch({"x": np.ones((2, 3)), "weights": np.full((2, 3), 0.5, np.float32)}, 4)
    assert padded["x"].shape == (4, 3)
    assert padded["weights"].tolist() == [[0.5] * 3] * 2 + [[0.0] * 3] * 2
    same(pad_batch(padded, 4), padded)
    with pytest.raises(DataError, match="A batch of 4 rows cannot be padded to 3"):
        pad_batch(padded, 3)
    with pytest.raises(DataError, match="these fields differ: x 2, y 3"):
        pad_batch({"x": np.ones(2), "y": np.ones(3)}, 4)


BAD = {
    "batch": ({"batch_size": 0}, "batch_size=0: a batch has at least 1 sample"),
    "epochs": ({"epochs": 0}, "epochs=0: at least 1, or None for no end"),
    "half": ({"process_index": 0}, "give both, or neither to take JAX's own"),
    "index": ({"process_index": 2, "process_count": 2}, "process_index=2 of process_count=2: indices go from 0 to 1"),
    "parts": ({"batch_size": 10, "process_index": 0, "process_count": 4}, "4 do not divide it. Use 8 or 12; or give"),
    "few": ({"batch_size": 2, "process_index": 0, "process_count": 4}, "4 do not divide it. Use 4; or give"),
    "seq_len": ({"seq_len": 8}, "seq_len=8 packs a TokenFile, and the source is a list. Leave it out."),
    "empty": ({"source": []}, "The source, a list, has no samples"),
    "not a dict": ({"source": [np.ones(3)]}, "Sample 0 of the source is a ndarray"),
    "taken": ({"source": [{"sample": 1}]}, "the name 'sample' is the loader's own"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case):
    settings, message = BAD[case]
    with pytest.raises(DataError) as error:
        Loader(**{"source": samples(5), "batch_size": 4, **settings})
    assert message in str(error.value)


def test_token_file_wants_a_length(tokens):
    with pytest.raises(DataError, match="seq_len is missing"):
        Loader(tokens, batch_size=4)


def test_samples_that_do_not_stack():
    with pytest.raises(DataError) as error:
        Loader([{"x": np.ones(2)}, {"x": np.ones(3)}], batch_size=2, seed=None).batch(0)
    assert str(error.value) == (
        "Samples of one batch have different shapes or dtypes:\nx: float64[2] and float64[3]\n"
        "Pad or crop them in the source."
    )
    with pytest.raises(DataError, match=r"different fields: x \| y"):
        Loader([{"x": 1}, {"y": 1}], batch_size=2).batch(0)


@pytest.mark.parametrize(
    ("held", "part"),
    [
        ([(0, 8)], (0, 1)),
        ([(0, 2), (2, 4)], (0, 2)),
        ([(4, 6), (6, 8), (4, 6), (6, 8)], (1, 2)),  # a tensor axis: two devices hold the same rows
        ([(6, 8)], (3, 4)),
    ],
)
def test_part_of(held, part):
    assert _part_of(held, 8) == part


@pytest.mark.parametrize("held", [[(0, 2), (4, 6)], [(2, 6)], [(0, 3)]])
def test_rows_that_are_no_part(held):
    with pytest.raises(DataError, match="of 8, which are not one of several equal parts"):
        _part_of(held, 8)


def plan_on(mesh):
    return jp.plan(lambda: {"w": np.ones((64, 64), np.float32)}, mesh, [jp.DP(), jp.FSDP(), jp.TP(column=("w",))])


def test_to_a_plan(tokens):
    plan = plan_on(jp.mesh(data=2, fsdp=2, tensor=2))
    loader = Loader(tokens, batch_size=8, seq_len=16)
    with loader.to(plan) as batches:
        for step in range(3):
            batch = next(batches)
            same({name: np.asarray(field) for name, field in batch.items()}, loader.batch(step))
            for field in batch.values():
                assert field.sharding.is_equivalent_to(
                    jax.sharding.NamedSharding(plan.mesh, P(("data", "fsdp"))), field.ndim
                )
    assert loader.step == 3


def test_to_a_plan_that_does_not_divide(tokens):
    plan = plan_on(jp.mesh(data=2, fsdp=2, tensor=2))
    with pytest.raises(DataError) as error:
        Loader(samples(9), batch_size=6).to(plan)
    assert str(error.value) == (
        "batch_size=6: mesh axes data, fsdp split it in 4, which do not divide it. Use 4 or 8; or give samples a field "
        "'weights', by which the loss counts them: rows of weight 0 then fill up each batch."
    )
    with Loader(tokens, batch_size=6, seq_len=16).to(plan) as batches:
        filled = next(batches)
    expected = Loader(tokens, batch_size=6, seq_len=16).batch(0)
    for name, field in expected.items():
        assert filled[name].shape == (8, *field.shape[1:])
        assert (np.asarray(filled[name])[:6] == field).all()
        assert not np.asarray(filled[name])[6:].any()
    with pytest.raises(DataError, match="hold part 0 of 1\\. Leave out both"):
        Loader(tokens, batch_size=8, seq_len=16, process_index=1, process_count=2).to(plan)


def test_to_hardware_that_is_not_here(tokens):
    plan = plan_on(jp.mesh("v5e-8", data=2, fsdp=2, tensor=2))
    with pytest.raises(DataError, match="for hardware that is not attached"):
        Loader(tokens, batch_size=8, seq_len=16).to(plan)
