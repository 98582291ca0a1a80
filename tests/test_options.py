"""Compiler options by name: each set says why, none contradicts in silence, and the compiler takes every one."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxpar as jp
from jaxpar import _hardware, _options
from jaxpar._options import OptionSet, compiler_options, option_sets
from jaxpar.explain import _child, _export
from jaxpar.explain._subject import subject


def test_every_set_has_a_reason_a_source_and_chips_that_there_are():
    for each in option_sets():
        assert each.options, each.name
        assert each.reason.endswith("."), each.name
        assert each.source.startswith(("[measured]", "[maxtext]", "docs.jax.dev")), each.name
        assert all(_hardware.chip_name(chip) == chip for chip in each.chips), each.name


@pytest.mark.parametrize("target", ["v5e", "v5e:16x16", "v5e-256", "v5litepod"])
def test_a_chip_is_named_by_itself_or_as_hardware(target):
    assert compiler_options(target, "no-windowed-einsum") == compiler_options(
        jp.mesh("v5e:2x2", data=4), "no-windowed-einsum"
    )


def test_sets_are_joined():
    both = compiler_options("v5e", "async-all-gather", "async-all-reduce")
    assert both["xla_enable_async_all_gather"] is both["xla_enable_async_all_reduce"] is True
    assert compiler_options("v5e") == {}


def test_an_unknown_set_is_answered_with_those_that_there_are():
    with pytest.raises(
        jp.StepError, match=r"v5e has no set 'no-windowed'. Did you mean 'no-windowed-einsum'\?"
    ) as error:
        compiler_options("v5e", "no-windowed")
    assert all(each.reason in str(error.value) for each in option_sets() if "v5e" in each.chips)
    with pytest.raises(jp.StepError, match="h100 has no set 'no-windowed-einsum'"):
        compiler_options("h100", "no-windowed-einsum")


def test_sets_that_contradict_are_refused(monkeypatch):
    def made(name, value):
        return OptionSet(name=name, chips=("v5e",), options={"xla_a": value}, reason="", source="")

    monkeypatch.setattr(_options, "option_sets", lambda: (made("one", 1), made("two", 2), made("same", 1)))
    assert compiler_options("v5e", "one", "same") == {"xla_a": 1}
    with pytest.raises(jp.StepError, match=r"'one' sets xla_a=1, and 'two' sets it to 2"):
        compiler_options("v5e", "one", "two")


@pytest.mark.libtpu
@pytest.mark.parametrize("name", ["v5e:2x2", "v6e:2x2"])
def test_the_compiler_takes_every_set(name, tmp_path):
    """All sets of a chip at once: an option that it does not know is an error."""
    mesh = jp.mesh(name, data=4)
    chip = _hardware.parse(name).chip.name
    options = compiler_options(chip, *(each.name for each in option_sets() if chip in each.chips))
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    made = subject(lambda x: x.sum(0), (x,), {}, None)
    exported = _export.export(dataclasses.replace(made, options=options))
    found = _child.compile_elsewhere(exported, tmp_path)
    assert found.text
    assert found.options == {option: str(value) for option, value in options.items()}
