"""The slow process is the one that is named."""

import pytest

from jaxpar import StepError
from jaxpar.run import Slow
from jaxpar.run._slow import Comparison


def lines(rows, **fields):
    comparison = Comparison(Slow(steps=4, **fields))
    return [pair for row in rows for pair in comparison.seen(row).items()]


def test_the_slow_process_is_named_once_with_the_numbers():
    ((process, text),) = lines([(1.0, 1.1, 2.5, 0.9)] * 9)
    assert process == 2
    assert text == (
        "Process 2 takes 2.5 s a step by itself, the others 1 s (process 3 is the quickest, 0.9 s), over 4 steps. "
        "Nothing was done: look at its input and its machine."
    )


def test_it_is_named_again_after_it_was_well():
    rows = [(1.0, 2.5)] * 6 + [(1.0, 1.0)] * 6 + [(1.0, 2.5)] * 6
    assert [process for process, _ in lines(rows)] == [1, 1]


@pytest.mark.parametrize(
    "rows",
    [
        [(1.0, 1.4)] * 9,
        [(0.001, 0.02)] * 9,
        [(1.0, 1.0), (1.0, 9.0), (1.0, 1.0), (1.0, 1.0)] * 4,
        [(5.0,)] * 9,
        [(1.0, 3.0)] * 3,
    ],
    ids=["a little", "milliseconds", "once in a while", "alone", "too early"],
)
def test_what_is_not_worth_a_line(rows):
    assert lines(rows) == []


def test_fields():
    assert lines([(1.0, 1.4)] * 9, ratio=1.3)
    assert lines([(0.001, 0.02)] * 9, at_least=0.01)
    for wrong in ({"ratio": 1.0}, {"steps": 0}):
        with pytest.raises(StepError, match="give a ratio above 1"):
            Slow(**wrong)
