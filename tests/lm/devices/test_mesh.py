"""Meshes from flags, and training steps on them that equal those on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lm.devices import mesh
from lm.losses import next_token as losses
from lm.model import params, presets
from lm.training import optimizer, train


@pytest.mark.parametrize(
    ('text', 'shape'),
    [(None, (8, 1, 1)), ('auto', (8, 1, 1)), ('data=4,model=2', (4, 1, 2)), ('model=4', (2, 1, 4)),
     ('data=4', (4, 1, 2)), ('model=1,data=8', (8, 1, 1)), ('data=2,sequence=4', (2, 4, 1)),
     ('sequence=2', (4, 2, 1)), ('sequence=2,data=2', (2, 2, 2))],
)  # fmt: skip
def test_missing_sizes_take_the_remaining_devices(text, shape):
    assert mesh.parse(text, 8) == shape


@pytest.mark.parametrize(
    'text',
    ['data=3', 'data=4,model=4', 'rows=2', 'data=two', 'data=0', 'data=²', 'data=8,data=8', 'x'],
)
def test_bad_meshes_are_refused(text):
    with pytest.raises(ValueError, match='--mesh'):
        mesh.parse(text, 8)


def test_an_indivisible_dimension_is_replicated():
    grid = mesh.make('data=4,model=2', jax.devices('cpu'))
    assert mesh.sharding(grid, ('vocab', 'embed'), (7, 8)).spec == P(None, 'data')
    # a mesh axis shards one dimension only
    assert mesh.sharding(grid, ('batch', 'length', 'embed'), (4, 3, 8)).spec == P(
        'data', None, None
    )


CONFIG = presets.tiny(2048)


def steps(text, count):
    """Returns the losses of a few steps on a mesh, and the compiled step."""
    devices = jax.devices('cpu')
    grid = mesh.make(text, devices if text else devices[:1])
    adam = optimizer.make(optimizer.OptimizerConfig(), 100, params.leaves(CONFIG))
    init = functools.partial(params.init, CONFIG)
    weights = jax.jit(init, out_shardings=params.shardings(CONFIG, grid))(jax.random.key(0))
    state = train.init_state(weights, adam, grid)
    shape = (8, 16)
    keys = jax.random.split(jax.random.key(1), 2)
    batch = {
        'tokens': jax.random.randint(keys[0], shape, 0, 2048),
        'targets': jax.random.randint(keys[1], shape, 0, 2048),
        'segments': jnp.ones(shape, jnp.int32),
        'positions': jnp.broadcast_to(jnp.arange(16), shape),
        'weights': jnp.ones(shape),
    }
    batch = train.put({k: np.asarray(v) for k, v in batch.items()}, grid)

    def loss(weights, batch, key):
        return losses.next_token_loss(weights, CONFIG, batch)

    step = jax.jit(functools.partial(train.train_step, loss, adam, 0))
    values = []
    with jax.set_mesh(grid):
        compiled = step.lower(state, batch).compile()
        for _ in range(count):
            state, metrics = step(state, batch)
            values.append(float(metrics['loss']))
    return values, compiled


@pytest.mark.parametrize('text', ['data=8', 'data=4,model=2'])
def test_a_mesh_computes_what_one_device_computes(text):
    values, compiled = steps(text, 4)
    np.testing.assert_allclose(values, steps(None, 4)[0], rtol=1e-5)
    # rows are sharded: no device ever holds the activations of all eight
    assert 'f32[8,16,64]' not in compiled.as_text()
    assert 'f32[128,1024]' not in compiled.as_text()
