"""Which checkpoints stay."""

import jax.numpy as jnp
import pytest

from jaxpar import checkpoint
from jaxpar._errors import CheckpointError
from jaxpar.checkpoint import Keep

NAN = float("nan")
LOSSES = {100: 3.0, 200: 1.0, 300: 2.0, 400: NAN, 500: 1.0}


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (Keep(), {300, 400, 500}),
        (Keep(last=1), {500}),
        (Keep(last=9), {100, 200, 300, 400, 500}),
        (Keep(last=1, every=200), {200, 400, 500}),
        (Keep(last=1, every=250), {300, 500}),  # the first at or after 250
        (Keep(last=1, best=1, metric="loss"), {500}),  # the newer of two equals
        (Keep(last=1, best=3, metric="loss"), {200, 300, 500}),
        (Keep(last=1, best=1, metric="loss", highest=True), {100, 500}),
        (Keep(last=1, best=9, metric="loss"), {100, 200, 300, 500}),  # NaN is never the best
        (Keep(last=1, best=1, metric="other"), {500}),
    ],
    ids=str,
)
def test_what_stays(keep, expected):
    assert keep.of({step: {"loss": loss} for step, loss in LOSSES.items()}) == expected


def test_it_stays_what_it_was():
    """Deleting as one goes keeps what deleting at the end would."""
    keep = Keep(last=2, every=30)
    stay = set()
    for step in range(7, 200, 7):
        stay = keep.of({each: {} for each in stay | {step}})
    assert stay == keep.of({step: {} for step in range(7, 200, 7)})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"last": 0}, "last=0 would delete every checkpoint. Give 1 or more, or leave it out."),
        ({"every": -1}, "every=-1 keeps none. Give 1 or more, or leave it out."),
        ({"best": 2}, "best and metric go together: best=2, metric='eval/loss'."),
        ({"metric": "loss"}, "best and metric go together"),
        ({"highest": True}, "best and metric go together"),
    ],
)
def test_settings_without_effect(settings, expected):
    with pytest.raises(CheckpointError) as caught:
        Keep(**settings)
    assert expected in str(caught.value)


def test_pruned_by_metric(tmp_path, caplog):
    for step, loss in enumerate([2.0, 1.0, 3.0, 4.0], 1):
        checkpoint.save(tmp_path, step, {"w": jnp.ones(3)}, metrics={"loss": jnp.float32(loss)})
    assert checkpoint.prune(tmp_path, Keep(last=2, best=1, metric="loss")) == [1]
    assert caplog.messages == []
    assert checkpoint.prune(tmp_path, Keep(last=2, best=1, metric="los")) == [2]
    (said,) = caplog.messages
    assert said == (
        f"{tmp_path}: no checkpoint has the metric 'los' (they have: loss), so none is kept as the best. Log it in the "
        "step that is saved."
    )
    assert checkpoint.steps(tmp_path) == [3, 4]


def test_metrics_are_numbers(tmp_path):
    with pytest.raises(CheckpointError, match=r"metrics: loss is \[1.0, 1.0\], not a number"):
        checkpoint.save(tmp_path, 1, {"w": jnp.ones(3)}, metrics={"loss": jnp.ones(2)})
