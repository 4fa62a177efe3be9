"""The chunked cross-entropy against the formula on whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.losses import cross_entropy
from lm.losses import next_token as losses


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
