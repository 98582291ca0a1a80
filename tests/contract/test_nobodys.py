"""Models that nobody wrote for us, zero lines of them changed: `(path pattern, dims)` rules say all there is to say.

One of Flax Linen, one of Equinox, one of plain pytrees (`jax.example_libraries.stax`), each as its package has it; and
a stranger's whole Linen model. On data 2 x fsdp 2 x tensor 2 each has the numbers of one device.
"""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.example_libraries import stax
from jax.sharding import PartitionSpec as P

import jaxpar as jp
from tests import _programs as programs
from tests.contract.strangers import linen_mixer

D, F, T, ROWS, CLASSES = 32, 64, 8, 32, 10
RANDOM = np.random.default_rng(0)
VECTORS = {
    "x": RANDOM.standard_normal((ROWS, D)).astype(np.float32),
    "label": RANDOM.integers(0, CLASSES, ROWS).astype(np.int32),
}
SEQUENCES = {
    "x": RANDOM.standard_normal((ROWS, T, D)).astype(np.float32),
    "y": RANDOM.standard_normal((ROWS, T, D)).astype(np.float32),
}
TOKENS = {"tokens": RANDOM.integers(0, linen_mixer.VALUES, (ROWS, linen_mixer.LENGTH)).astype(np.int32)}

attention = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=F)
mixer = linen_mixer.Mixer()
stax_init, stax_apply = stax.serial(stax.Dense(F), stax.Gelu, stax.Dense(CLASSES))


def attention_loss(params, batch):
    return jnp.mean((attention.apply({"params": params}, batch["x"]) - batch["y"]) ** 2)


def mixer_loss(params, batch):
    logits = mixer.apply({"params": params}, batch["tokens"])
    wanted = jax.nn.one_hot(jnp.sort(batch["tokens"], axis=-1), linen_mixer.VALUES)
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * wanted, axis=-1))


def equinox_loss(model, batch):
    return programs.of_classes(jax.vmap(model)(batch["x"]), batch)


def stax_loss(params, batch):
    with jax.numpy_rank_promotion("allow"):  # as stax adds its biases
        return programs.of_classes(stax_apply(params, batch["x"]), batch)


COLUMN, ROW = ("embed", "mlp"), ("mlp", "embed")
CASES = {
    "linen": (
        programs.Case(
            name="linen attention",
            make=lambda: attention.init(jax.random.key(0), jnp.ones((1, T, D)))["params"],
            loss=attention_loss,
            batch=SEQUENCES,
            tensor={},
            dims=(
                ("query.kernel", ("embed", "heads", None)),
                ("key.kernel", ("embed", "heads", None)),
                ("value.kernel", ("embed", "heads", None)),
                ("out.kernel", ("heads", None, "embed")),
            ),
        ),
        {"query.kernel": P("fsdp", "tensor"), "out.kernel": P("tensor", None, "fsdp")},
    ),
    "a stranger's": (
        programs.Case(
            name="linen mixer",
            make=lambda: mixer.init(jax.random.key(0), jnp.ones((1, linen_mixer.LENGTH), jnp.int32))["params"],
            loss=mixer_loss,
            batch=TOKENS,
            tensor={},
            dims=(("feed*.up.kernel", COLUMN), ("feed*.down.kernel", ROW)),
        ),
        {"feed1.up.kernel": P("fsdp", "tensor"), "feed0.down.kernel": P("tensor", "fsdp")},
    ),
    "equinox": (
        programs.Case(
            name="equinox MLP",
            make=lambda: eqx.nn.MLP(D, CLASSES, F, 1, key=jax.random.key(0)),
            loss=equinox_loss,
            batch=VECTORS,
            tensor={},
            dims=(("layers.0.weight", ROW), ("layers.1.weight", (None, "mlp"))),  # weights are [out, in]
        ),
        {"layers.0.weight": P("tensor", "fsdp"), "layers.1.weight": P("fsdp", "tensor")},
    ),
    "pytree": (
        programs.Case(
            name="stax",
            make=lambda: stax_init(jax.random.key(0), (-1, D))[1],
            loss=stax_loss,
            batch=VECTORS,
            tensor={},
            dims=(("0.0", COLUMN), ("2.0", ("mlp", None))),
        ),
        {"0.0": P("fsdp", "tensor"), "2.0": P("tensor", "fsdp")},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_partitioned_by_rules_and_has_the_numbers_of_one_device(name):
    case, specs = CASES[name]
    strategies = [jp.DP(), jp.FSDP(min_bytes=2048), jp.TP()]
    trained = programs.train(case, programs.mesh(data=2, fsdp=2, tensor=2), strategies)
    programs.check_same(case, trained)
    assert {path: trained.plan.records[path].storage for path in specs} == specs
    assert trained.step.num_compilations == 1
    jp.testing.assert_sharding(trained.state[0], trained.plan)
