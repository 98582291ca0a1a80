"""What counts as a bad loss, by numbers alone."""

import math

import pytest

from jaxpar import StepError
from jaxpar.run import Loss
from jaxpar.run._loss import Judge


def faults(losses, loss):
    judge = Judge(loss)
    found = [judge.seen(step, {"loss": value}) for step, value in enumerate(losses, start=1)]
    return [fault for fault in found if fault]


NOISY = [2 + 0.1 * (step % 5) for step in range(20)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number(value):
    (fault,) = faults([2.0, 1.9, value], Loss())
    assert (fault.kind, fault.step, fault.sound, fault.skip) == ("nan", 3, 1, (3,))
    assert fault.text == f"loss is {value} in step 3"


def test_other_metrics_and_none():
    judge = Judge(Loss(metrics=("loss", "grad_norm")))
    assert judge.seen(1, {"grad_norm": math.nan}).text == "grad_norm is nan in step 1"
    assert judge.seen(1, {"accuracy": math.nan}) is None
    assert Judge(Loss(metrics=("accuracy",))).seen(1, {"loss": math.nan}) is None


def test_the_same_place_again_leaves_out_the_batch_before_too():
    judge = Judge(Loss())
    assert judge.seen(7, {"loss": math.nan}).skip == (7,)
    judge.back_to(5)
    assert judge.seen(6, {"loss": 1.0}) is None
    fault = judge.seen(7, {"loss": math.nan})
    assert (fault.skip, fault.text) == ((6, 7), "loss is nan in step 7, again")


def test_a_spike_is_far_above_the_scatter():
    (fault,) = faults([*NOISY, 4.0, 2.0], Loss(spike=10, window=20))
    assert (fault.kind, fault.step, fault.sound, fault.skip) == ("spike", 21, 20, (21,))
    assert fault.text == "loss is 4 in step 21, and 2.2 is usual (3.683 at most)"
    assert faults([*NOISY, 3.6, 0.1], Loss(spike=10, window=20)) == []


@pytest.mark.parametrize("loss", [Loss(window=20), Loss(spike=10, window=21)], ids=["not asked for", "too early"])
def test_no_spike_without_asking_or_knowing(loss):
    assert faults([*NOISY, 400.0], loss) == []


def test_a_spike_is_no_part_of_what_is_usual():
    judge = Judge(Loss(spike=10, window=20))
    for step, value in enumerate(NOISY, start=1):
        judge.seen(step, {"loss": value})
    assert [judge.seen(step, {"loss": 4.0}).kind for step in range(21, 60)] == ["spike"] * 39


def test_steps_that_are_done_again_count_once():
    once, twice = Judge(Loss(spike=10, window=20)), Judge(Loss(spike=10, window=20))
    for step, value in enumerate(NOISY, start=1):
        once.seen(step, {"loss": value})
        twice.seen(step, {"loss": value})
    twice.back_to(10)
    for step, value in list(enumerate(NOISY, start=1))[10:]:
        twice.seen(step, {"loss": value})
    assert list(once._before) == list(twice._before)


@pytest.mark.parametrize("wrong", [{"metrics": ()}, {"spike": 0.0}, {"window": 2}])
def test_what_makes_no_sense(wrong):
    with pytest.raises(StepError, match="give a spike above 0"):
        Loss(**wrong)
    Loss(metrics=("loss",), spike=0.1, window=3)
