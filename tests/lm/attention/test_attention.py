"""Attention against the formula, row by row."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice

from lm.attention import attention as attention_lib
from lm.attention.attention import attention
from lm.devices import mesh as mesh_lib
from lm.kernels.mask import Mask
from lm.kernels.scoring import Scoring

B, L, S, C = 2, 5, 9, 8


def formula(q, k, v, visible, scale, softcap, added=None, temperature=1.0):
    """softmax((cap tanh(scale q k / cap) + added) / temperature) v, one query at a time, in f64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, l, h in np.ndindex(q.shape[:3]):
        group = h // (q.shape[2] // k.shape[1])
        keys = np.flatnonzero(visible[b, group % visible.shape[1], l])
        if not keys.size:
            continue
        logits = scale * k[b, group, keys] @ q[b, l, h]
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        if added is not None:
            logits = logits + added[b, group, keys]
        logits = logits / temperature
        weights = np.exp(logits - logits.max())
        out[b, l, h] = weights @ v[b, group, keys] / weights.sum()
    return out


@pytest.mark.parametrize(('heads', 'kv_heads'), [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize('softcap', [None, 2.0])
def test_equals_the_formula(heads, kv_heads, softcap):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (B, L, heads, C))
    k = jax.random.normal(keys[1], (B, kv_heads, S, C))
    v = jax.random.normal(keys[2], (B, kv_heads, S, C))
    # each head keeps other rows; row 0 of the second text sees nothing
    key_position = jax.random.randint(keys[3], (B, kv_heads, S), -2, 8)
    query_position = jnp.asarray([[3, 4, 5, 6, 7], [-1, 2, 4, 6, 8]])
    mask = Mask(query_position, key_position, window=4)
    visible = (
        (key_position[:, :, None] >= 0)
        & (key_position[:, :, None] <= query_position[:, None, :, None])
        & (query_position[:, None, :, None] - key_position[:, :, None] < 4)
    )
    expected = formula(q, k, v, np.asarray(visible), 0.4, softcap)
    out = attention(q, k, v, mask, scoring=Scoring(0.4, softcap))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert (out[1, 0] == 0).all()


def test_bias_and_noise_come_after_the_cap_and_before_the_temperature():
    keys = jax.random.split(jax.random.key(1), 5)
    q = jax.random.normal(keys[0], (B, L, 4, C))
    k, v = jax.random.normal(keys[1], (2, B, 2, S, C))
    bias, noise = jax.random.normal(keys[2], (B, 2, S)), jax.random.gumbel(keys[3], (B, 1, S))
    position = jnp.broadcast_to(jnp.arange(S), (B, 1, S))
    mask = Mask(jnp.full((B, L), S), position, key_bias=bias)
    out = attention(q, k, v, mask, Scoring(0.9, 1.5, 1.7, noise))
    added = np.asarray(bias + noise, np.float64)
    expected = formula(q, k, v, np.ones((B, 1, L, S), bool), 0.9, 1.5, added, 1.7)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_a_query_that_sees_nothing_has_no_gradient():
    q, k = jnp.ones((1, 1, 1, 2)), jnp.ones((1, 1, 3, 2))
    mask = Mask(jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1, 3), -1))
    total = lambda q, k: attention(q, k, k, mask, Scoring(1.0)).sum()  # noqa: E731
    gradient = jax.grad(total, (0, 1))(q, k)
    assert all((g == 0).all() for g in gradient)


def test_shapes_that_do_not_fit_are_refused():
    q, k = jnp.ones((1, 2, 4, 2)), jnp.ones((1, 2, 3, 2))
    mask = Mask(jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 1, 3), jnp.int32))
    with pytest.raises(AssertionError):
        attention(q, k, k[:, :, :2], mask, scoring=Scoring(1.0))


@pytest.mark.parametrize(
    ('capability', 'expected'),
    [('7.5', 'xla'), ('8.0', 'triton'), ('12.0', 'triton'), ('gfx942', 'xla')],
)
def test_kernels_are_for_recent_gpus(monkeypatch, capability, expected):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(jax, 'local_devices', lambda: [device])
    assert attention_lib.best() == expected


@pytest.mark.parametrize(('platform', 'expected'), [('gpu', 'triton'), ('tpu', 'mosaic')])
def test_a_mesh_that_this_host_does_not_have_gets_its_kernels(platform, expected):
    device = AbstractDevice('a recent one', 1, platform)
    mesh = mesh_lib.abstract(2, 2, device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert attention_lib.best() == expected
