"""The chunked cross-entropy against the formula on whole logits; examples of docstrings."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.losses import cross_entropy, online_softmax
from lm.losses import next_token as losses
from lm.losses.loss import Sum
from lm.model import leaves, params, presets, tables, transformer
from lm.training import step_log


def dense(h, table, targets, softcap):
    logits = h @ table.T
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
    return log_normalizer - target, log_normalizer


@pytest.mark.parametrize('softcap', [None, 3.0])
@pytest.mark.parametrize('chunk', [7, 16, 50, 64])
def test_value_and_gradients_equal_the_dense_formula(softcap, chunk):
    keys = jax.random.split(jax.random.key(0), 4)
    h = jax.random.normal(keys[0], (9, 12))
    table = jax.random.normal(keys[1], (50, 12))
    targets = jax.random.randint(keys[2], (9,), 0, 50)
    weights = jax.random.normal(keys[3], (2, 9))

    def total(f):
        def scalar(h, table):
            nats, log_normalizer = f(h, table)
            return (nats * weights[0]).sum() + (log_normalizer**2 * weights[1]).sum()

        return jax.value_and_grad(scalar, argnums=(0, 1))(h, table)

    ours = total(lambda h, t: cross_entropy.chunked_cross_entropy(h, t, targets, softcap, chunk))
    theirs = total(lambda h, t: dense(h, t, targets, softcap))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_memory_does_not_grow_with_the_vocabulary():
    def temporary(vocab_size):
        h = jax.ShapeDtypeStruct((512, 64), jnp.float32)
        table = jax.ShapeDtypeStruct((vocab_size, 64), jnp.float32)
        targets = jax.ShapeDtypeStruct((512,), jnp.int32)

        def mean(h, table, targets):
            return cross_entropy.chunked_cross_entropy(h, table, targets).nats.mean()

        step = jax.jit(jax.grad(mean, argnums=(0, 1))).lower(h, table, targets).compile()
        return step.memory_analysis().temp_size_in_bytes

    small, large = temporary(1024), temporary(32_768)
    assert large < 1.2 * small + 32_768 * 64 * 4


def test_bits_per_byte_of_uniform_bytes_is_eight():
    assert losses.bits_per_byte(1000 * np.log(256), 1000) == pytest.approx(8.0)


@pytest.mark.parametrize('rows', [50, 31])
def test_logprobs_of_given_ids_are_those_of_all_logits(rows):
    keys = jax.random.split(jax.random.key(0), 3)
    h = jax.random.normal(keys[0], (2, 5, 12))
    table = jax.random.normal(keys[1], (50, 12))
    ids = jax.random.randint(keys[2], (2, 5), 0, rows)
    # as a traced number: one program serves any
    found = jax.jit(lambda rows: cross_entropy.logprobs(h, table, ids, 3.0, rows))(rows)
    logits = 3.0 * jnp.tanh(h @ table[:rows].T / 3.0)
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    if rows == 50:
        np.testing.assert_allclose(cross_entropy.logprobs(h, table, ids, 3.0), found, rtol=1e-6)


def test_hidden_states_of_a_batch_give_its_losses():
    config = presets.tiny(31)
    weights = params.init(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 31)
    batch = {
        'tokens': tokens[:, :-1], 'targets': tokens[:, 1:],
        'segments': jnp.array([[1] * 3 + [2] * 5] * 2),
        'positions': jnp.array([[*range(3), *range(5)]] * 2),
    }  # fmt: skip
    h = losses.hidden(weights, config, {k: x for k, x in batch.items() if k != 'targets'})
    logits = transformer.forward(
        weights, config, batch['tokens'], batch['positions'], batch['segments']
    )
    np.testing.assert_allclose(
        tables.unembed(weights['tables'], config, h), logits, rtol=1e-5, atol=1e-5
    )
    table = tables.output_table(weights['tables'])
    nats = losses.token_losses(weights, config, batch).nats
    np.testing.assert_allclose(-cross_entropy.logprobs(h, table, batch['targets']), nats, rtol=1e-6)


def test_a_mean_of_nothing_is_zero():
    assert Sum(jnp.float32(3), jnp.float32(0.5)).mean == 6.0
    assert Sum(0.0, 0.0).mean == 0.0


@pytest.mark.parametrize('module', [online_softmax, cross_entropy, losses, leaves, step_log])
def test_examples_in_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
