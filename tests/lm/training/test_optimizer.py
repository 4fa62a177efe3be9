"""Schedules at their corners, and what weight decay touches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.training import optimizer
from lm.training.optimizer import OptimizerConfig


@pytest.mark.parametrize(('kind', 'last'), [('cosine', 0.1), ('constant', 1.0), ('rsqrt', None)])
def test_schedules_rise_to_the_rate_and_end_where_they_should(kind, last):
    config = OptimizerConfig(learning_rate=2.0, schedule=kind, warmup_steps=10)
    rate = optimizer.schedule(config, 100)
    values = [float(rate(step)) for step in range(101)]
    assert 0 < values[0] < 0.3 and values[10] == pytest.approx(2.0)
    assert (np.diff(values[:10]) > 0).all()
    expected = 2.0 * last if last else 2.0 * (10 / 100) ** 0.5
    assert values[100] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize('name', ['adamw', 'adafactor', 'muon'])
def test_decay_is_scaled_by_the_rate_and_spares_tables_and_norms(name):
    config = OptimizerConfig(
        name, learning_rate=0.5, schedule='constant', warmup_steps=0, weight_decay=0.1
    )
    chain = optimizer.make(config, 10)
    params = {'wq_NDHC': jnp.full((2, 3), 4.0), 'norm_D': jnp.full(3, 4.0), 'table': jnp.ones(3)}
    zero = {name: jnp.zeros_like(value) for name, value in params.items()}
    updates, _ = chain.update(zero, chain.init(params), params)
    np.testing.assert_allclose(updates['wq_NDHC'], -0.5 * 0.1 * 4.0, rtol=1e-6)
    assert (updates['norm_D'] == 0).all() and (updates['table'] == 0).all()


def test_muon_moves_matrices_by_orthogonal_ones():
    config = OptimizerConfig('muon', 0.5, schedule='constant', warmup_steps=0, weight_decay=0.0)
    chain = optimizer.make(config, 10)
    sides = {'wq_NDHC': (2, 8, 2, 3), 'wo_NHCD': (2, 2, 3, 8), 'w_down_NFD': (2, 12, 8)}
    sides |= {'wk_DKC': (8, 2, 3), 'wo_HCD': (2, 3, 8), 'w_up_DF': (8, 12), 'w_out_DD': (8, 8)}
    matrix = {'wq_NDHC': (8, 6), 'wo_NHCD': (6, 8), 'w_down_NFD': (12, 8)}
    matrix |= {'wk_DKC': (8, 6), 'wo_HCD': (6, 8), 'w_up_DF': (8, 12), 'w_out_DD': (8, 8)}
    random = np.random.default_rng(0)
    gradient = {name: jnp.asarray(random.normal(size=shape)) for name, shape in sides.items()}
    gradient['input_VD'] = jnp.asarray(random.normal(size=(5, 8)))
    zeros = {name: jnp.zeros_like(x) for name, x in gradient.items()}
    updates, _ = jax.jit(chain.update)(gradient, chain.init(zeros), zeros)
    for name, shape in matrix.items():
        for layer in updates[name] if '_N' in name else [updates[name]]:
            stretch = np.linalg.svd(np.reshape(layer, shape), compute_uv=False)
            assert stretch.max() < 2 * stretch.min(), name  # five Newton-Schulz steps
            assert np.sqrt(np.mean(np.square(layer))) == pytest.approx(0.5 * 0.2, rel=0.3)
    step = np.abs(updates['input_VD'])  # Adam's first one: all as far, whatever their gradient
    np.testing.assert_allclose(step, step[0, 0], rtol=1e-3)


def test_bad_settings_name_the_field():
    with pytest.raises(ValueError, match='learning_rate'):
        OptimizerConfig(learning_rate=0.0)
    with pytest.raises(ValueError, match='schedule'):
        optimizer.schedule(OptimizerConfig(schedule='step'), 10)
