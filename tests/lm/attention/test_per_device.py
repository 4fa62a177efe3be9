"""Kernels on a mesh give what they give on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.attention import attention as attention_lib
from lm.devices import mesh as mesh_lib
from lm.kernels import reference, sparse
from lm.kernels.scoring import Scoring
from tests.lm.kernels.cases import Case, assert_near, inputs, scored

# Triton's kernels, interpreted: Mosaic's interpreter serves one device at a time.
KERNEL = 'triton'


@pytest.fixture(scope='module')
def mesh():
    return mesh_lib.make('data=2,model=4', jax.devices('cpu')[:8])


# KV heads that divide over four devices, that are fewer, and that do neither
@pytest.mark.parametrize(('heads', 'kv_heads'), [(8, 4), (8, 2), (6, 3)])
def test_attention_and_gradients(mesh, heads, kv_heads):
    q, k, v, mask = inputs(Case(20, 20, heads=heads, kv_heads=kv_heads, segments=True, window=9))

    def total(attend, q, k, v):
        out, lse = attend(q, k, v, mask, scoring=Scoring(0.3))
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse)

    kernel = functools.partial(attention_lib.attention_and_lse, implementation=KERNEL)
    expected = jax.grad(functools.partial(total, reference.attention), (0, 1, 2))(q, k, v)
    with jax.set_mesh(mesh):
        actual = jax.jit(jax.grad(functools.partial(total, kernel), (0, 1, 2)))(q, k, v)
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e, jnp.float32)


@pytest.mark.parametrize(
    ('heads', 'kv_heads', 'with_terms'), [(8, 4, False), (8, 2, False), (8, 2, True)]
)
def test_a_layer_of_a_cache_and_its_column_sums(mesh, heads, kv_heads, with_terms):
    case = Case(5, 40, heads=heads, kv_heads=kv_heads, cached=True, tree=True)
    q, k, v, mask = inputs(case)
    mask, scoring = scored(case, mask) if with_terms else (mask, Scoring(0.3))
    stack = [jnp.stack([x + 1, x]) for x in (k, v)]
    counted = jnp.ones(q.shape[:2], bool)

    def run(q, k, v, layer):
        settings = {'implementation': KERNEL, 'layer': layer, 'scoring': scoring}
        out, lse = attention_lib.attention_and_lse(q, k, v, mask, **settings)
        return out, lse, attention_lib.column_sums(q, k, lse, mask, counted, **settings)

    with jax.set_mesh(mesh):
        out, lse, sums = jax.jit(run)(q, *stack, 1)
    expected, expected_lse = reference.attention(q, k, v, mask, scoring)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5)
    by_formula = reference.column_sums(q, k, lse, mask, counted, scoring)
    np.testing.assert_allclose(sums, by_formula, atol=1e-5)


@pytest.mark.parametrize(('kv_heads', 'nodes'), [(4, 1), (2, 1), (2, 4)])
def test_kept_rows(mesh, kv_heads, nodes):
    tree = nodes > 1
    case = Case(nodes, 70, heads=8, kv_heads=kv_heads, cached=True, tree=tree)
    q, k, v, mask = inputs(case)
    mask, scoring = scored(case, mask) if tree else (None, Scoring(0.3))
    index = sparse.from_rows(jax.random.bernoulli(jax.random.key(0), 0.3, k.shape[:3]), 32, 3)
    run = functools.partial(attention_lib.sparse_decode, implementation=KERNEL)
    with jax.set_mesh(mesh):
        out, _ = jax.jit(run)(q, k, v, index, scoring, mask)
    expected, _ = reference.sparse_decode(q, k, v, index, scoring, mask)
    np.testing.assert_allclose(out, expected, atol=1e-5)
