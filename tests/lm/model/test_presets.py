"""Every preset's train and decode step type-checks at its true size, on an abstract mesh."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import pytest

from lm.devices import mesh
from lm.losses import next_token as losses
from lm.model import params, presets
from lm.model.contract import chain
from lm.training import optimizer, train
from tests.lm.model.steps import empty, step

ROWS, LENGTH, KEYS = 8, 16, 64
MESH = mesh.abstract(8, 4)


def shape_of(tree):
    """Shapes and dtypes, to compare the inputs of a step with its outputs."""
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def integers(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.fixture(params=presets.PRESETS, ids=lambda preset: preset.__name__)
def config(request):
    return request.param()


def test_train_step(config):
    weights = params.abstract(config, MESH)
    adam = optimizer.make(optimizer.OptimizerConfig(), 100, params.leaves(config))
    state = train.TrainState(integers(), weights, jax.eval_shape(adam.init, weights))
    names = ('tokens', 'targets', 'positions', 'segments')
    batch = {name: integers(ROWS, LENGTH) for name in names}
    batch['weights'] = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.float32)

    def loss(weights, batch, key):
        return losses.next_token_loss(weights, config, batch, z_loss=1e-4)

    step = functools.partial(train.train_step, loss, adam, 0)
    after, metrics = jax.eval_shape(step, state, batch)
    assert shape_of(after) == shape_of(state)
    chex.assert_shape(metrics['loss'], ())
    assert metrics['loss'].dtype == jnp.float32


@pytest.mark.parametrize('nodes', [1, 5])
def test_decode_step(config, nodes):
    weights = params.abstract(config, MESH)
    before = jax.eval_shape(lambda: empty(config, ROWS, KEYS))
    ancestors = integers(ROWS, nodes, -(-nodes // 32))

    def run(weights, tokens_BL, before, ancestors_BLW):
        tree = chain(tokens_BL)._replace(ancestors_BTW=ancestors_BLW)
        return step(weights, config, before, tree)

    logits, after = jax.eval_shape(run, weights, integers(ROWS, nodes), before, ancestors)
    chex.assert_shape(logits, (ROWS, nodes, config.vocab_size))
    assert logits.dtype == jnp.float32
    assert shape_of(after) == shape_of(before)


def test_large_leaves_are_split(config):
    """No device of 32 holds more than a quarter of a matrix of ten million entries."""
    for leaf in jax.tree.leaves(params.abstract(config, MESH)):
        if leaf.size > 1e7:
            shard = leaf.sharding.shard_shape(leaf.shape)
            assert math.prod(shard) <= leaf.size / 4
