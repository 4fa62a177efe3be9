"""Schedules at their corners; weight decay, and the input and output axes of matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafts import adapter
from lm.model import leaves, params, presets
from lm.model.leaves import Leaf, matrix
from lm.training import optimizer
from lm.training.optimizer import OptimizerConfig
from tokenization.transfer import hypernetwork


@pytest.mark.parametrize(('kind', 'last'), [('cosine', 0.1), ('constant', 1.0), ('rsqrt', None)])
def test_schedules_warm_up_to_the_rate_and_end_as_configured(kind, last):
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
    declared = {
        'wq_DF': matrix((2, 3), ('embed', 'ff'), None),
        'norm_D': Leaf((3,), ('norm',), None),
        'table': Leaf((3,), ('vocab',), None),
    }
    chain = optimizer.make(config, 10, declared)
    values = {'wq_DF': jnp.full((2, 3), 4.0), 'norm_D': jnp.full(3, 4.0), 'table': jnp.ones(3)}
    zero = {name: jnp.zeros_like(value) for name, value in values.items()}
    updates, _ = chain.update(zero, chain.init(values), values)
    np.testing.assert_allclose(updates['wq_DF'], -0.5 * 0.1 * 4.0, rtol=1e-6)
    assert (updates['norm_D'] == 0).all() and (updates['table'] == 0).all()


def test_muon_moves_matrices_by_orthogonal_ones():
    config = OptimizerConfig('muon', 0.5, schedule='constant', warmup_steps=0, weight_decay=0.0)
    declared, flat = {}, {}
    for name, (shape, inputs) in {
        'wq_DHC': ((8, 2, 3), 1), 'wo_HCD': ((2, 3, 8), 2), 'w_down_FD': ((12, 8), 1),
        'wk_DKC': ((8, 2, 3), 1), 'w_up_DF': ((8, 12), 1), 'w_out_DD': ((8, 8), 1),
    }.items():  # fmt: skip
        leaf = matrix(shape, ('ff',) * len(shape), None, inputs)
        # some of them single, others stacked over layers
        stacked = name in ('wq_DHC', 'wo_HCD', 'w_down_FD')
        declared[name + '_N' * stacked] = leaves.stacked(leaf, 2) if stacked else leaf
        flat[name + '_N' * stacked] = (np.prod(shape[:inputs]), np.prod(shape[inputs:]))
    declared['input_VD'] = Leaf((5, 8), ('vocab', 'embed'), None)
    chain = optimizer.make(config, 10, declared)
    random = np.random.default_rng(0)
    gradient = {name: jnp.asarray(random.normal(size=x.shape)) for name, x in declared.items()}
    zeros = {name: jnp.zeros_like(x) for name, x in gradient.items()}
    updates, _ = jax.jit(chain.update)(gradient, chain.init(zeros), zeros)
    for name, shape in flat.items():
        for layer in updates[name] if name.endswith('_N') else [updates[name]]:
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


def by_name(path, leaf):
    """Whether a leaf decays, and its axes as a matrix, from its name (by convention)."""
    name = path[-1].key
    if not name.startswith('w'):
        return False, None
    letters = name.rpartition('_')[2]
    axes = tuple(range(letters.startswith('N'), len(leaf.shape)))
    inputs = 1 if letters[axes[0]] == 'D' else len(axes) - 1
    return True, (axes[:inputs], axes[inputs:])


HYPERNETWORK = hypernetwork.HypernetworkConfig(300)
EVERY_KIND = {
    **{preset.__name__: params.leaves(preset()) for preset in presets.PRESETS},
    'adapter': adapter.leaves(presets.tiny()),
    'hypernetwork': hypernetwork.leaves(HYPERNETWORK),
}


@pytest.mark.parametrize('declared', EVERY_KIND.values(), ids=EVERY_KIND)
def test_declarations_agree_with_names(declared):
    for path, leaf in jax.tree_util.tree_leaves_with_path(declared, is_leaf=leaves.is_leaf):
        assert (leaf.decay, leaf.matrix) == by_name(path, leaf), path
