import pytest

from jaxpar import _errors
from jaxpar._errors import listed, nearest


@pytest.mark.parametrize("kind", ["ShardingError", "MeshError", "StepError", "DataError", "CheckpointError"])
def test_every_error_is_a_value_error(kind):
    assert issubclass(getattr(_errors, kind), ValueError)


def test_nearest_names_a_close_word_only():
    assert nearest("tensr", ["tensor", "data"]) == " Did you mean 'tensor'?"
    assert nearest("pipe", ["tensor", "data"]) == ""
    assert nearest("tensor", {}) == ""


def test_listed_counts_the_tail():
    assert listed(["a", "b"], 2) == "a\nb"
    assert listed(["a", "b", "c", "d"], 2) == "a\nb\n... and 2 more"
