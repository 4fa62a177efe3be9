"""Models on sharded sequences: training, losses by position, unsupported features."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lexinvariant import models
from lm.attention import attention as attention_lib
from lm.attention import ring, ring_blocks
from lm.devices import mesh as mesh_lib
from lm.kernels import sparse
from lm.kernels.mask import Mask
from lm.kernels.scoring import Scoring
from lm.losses import next_token as losses
from lm.model import lexinvariant, params, presets
from lm.model.config import Config, Lexinvariant
from lm.training import optimizer, train
from tests.lm.attention.packed_rows import packed
from tests.lm.model.steps import empty, step


def small(**changes) -> Config:
    return dataclasses.replace(
        presets.tiny(96), n_layers=2, window=5, window_pattern=(True, False), unroll=1, **changes
    )


def trained(text: str, config: Config) -> tuple[list[float], str]:
    """Returns the losses of 20 steps on packed rows, and the compiled step."""
    grid = mesh_lib.make(text, jax.devices('cpu')[: 1 if text == 'data=1' else 8])
    adam = optimizer.make(optimizer.OptimizerConfig(), 100, params.leaves(config))
    place = params.shardings(config, grid)
    init = jax.jit(functools.partial(params.init, config), out_shardings=place)
    state = train.init_state(init(jax.random.key(0)), adam, grid)
    rng = np.random.default_rng(0)
    segment, position = packed(8, 16)
    batch = {
        'tokens': rng.integers(0, 96, (8, 16)).astype(np.int32),
        'targets': rng.integers(0, 96, (8, 16)).astype(np.int32),
        'segments': segment,
        'positions': position,
        'weights': (segment > 0).astype(np.float32),
    }

    def loss(weights, batch, key):
        return losses.next_token_loss(weights, config, batch, 1e-4, key)

    values = []
    with jax.set_mesh(grid):
        here = train.put(batch, grid)
        step = (
            jax.jit(functools.partial(train.train_step, loss, adam, 0)).lower(state, here).compile()
        )
        for _ in range(20):
            state, metrics = step(state, here)
            values.append(float(metrics['loss']))
    return values, step.as_text()


def test_training_equals_that_on_one_device():
    expected, _ = trained('data=1', small())
    values, text = trained('data=2,sequence=2,model=2', small(ring='queries'))
    assert expected[-1] < expected[0] - 0.5
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    # neither rows nor sequences are ever all-gathered: of 8 x 16 tokens, a device has 4 x 8
    gathered = re.findall(r'= f32\[([\d,]+)\]\S* all-gather(?:-start)?\(', text)
    assert not [shape for shape in gathered if shape.startswith(('8,16', '4,16', '8,8'))]


def test_losses_by_position_are_in_text_order():
    config = small()
    weights = params.init(config, jax.random.key(0))
    text = types.SimpleNamespace(test_RL=np.random.default_rng(0).integers(0, 96, (3, 17)))
    fitted = types.SimpleNamespace(config=config, params=weights)
    one, cut = (
        models.nats_by_position(fitted, text, 4, mesh_lib.make(mesh, jax.devices('cpu')[:n]))
        for mesh, n in (('data=1', 1), ('sequence=2', 2))
    )
    np.testing.assert_allclose(cut, one, rtol=1e-5)


def test_features_that_need_whole_sequences_are_refused():
    config, key = small(), jax.random.key(0)
    q, k = jnp.zeros((1, 1, 4, 16)), jnp.zeros((1, 2, 32, 16))
    index = sparse.from_rows(jnp.ones(k.shape[:3], bool), 32, 1)
    mask = Mask(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, 32), jnp.int32))
    ones = jnp.ones((1, 1, 4)), mask, jnp.ones((1, 1), bool)
    calls = [
        lambda: step(params.init(config, key), config, empty(config, 1, 8), jnp.zeros((1, 4), int)),
        lambda: attention_lib.column_sums(q, k, *ones, scoring=Scoring(1.0)),
        lambda: attention_lib.sparse_decode(q, k, k, index, scoring=Scoring(1.0)),
    ]
    with jax.set_mesh(mesh_lib.make('sequence=2', jax.devices('cpu')[:2])):
        for call in calls:
            with pytest.raises(ValueError, match='not supported on a mesh with sequence=2'):
                jax.eval_shape(call)
        # short ones, such as a hypernetwork's pieces, are replicated
        assert not ring.is_cut(jnp.zeros((1, 7, 4, 16)), jnp.zeros((1, 2, 7, 16)))
        with pytest.raises(ValueError, match="ring 'both': expected one of keys, queries"):
            settings = ring_blocks.Settings('xla', False, Scoring(1.0), True)
            ring.attention(q, k, k, mask, settings.scoring, settings, 'both')
    with pytest.raises(ValueError, match=r'Config.ring.*expected one of'):
        small(ring='both')


def test_learned_rows_mixed_with_drawn_ones_are_not_all_gathered():
    config = small(tied=True, lexinvariant=Lexinvariant('gaussian', 0.5))
    grid = mesh_lib.make('data=2,sequence=2', jax.devices('cpu')[:4])
    weights = params.abstract(config, grid)['tables']
    tokens = jax.ShapeDtypeStruct((4, 16), jnp.int32, sharding=mesh_lib.batch_sharding(grid))

    def loss(learned, tokens):
        keys = lexinvariant.sequence_keys(jax.random.key(0), 4)
        return (lexinvariant.embed(learned, config, keys, tokens, tokens) ** 2).sum()

    with jax.set_mesh(grid):
        text = jax.jit(jax.grad(loss)).lower(weights, tokens).compile().as_text()
    # vectors of width 64 for 4 x 16 tokens, of which a device has 2 x 8
    assert not re.findall(r'f32\[(?:4,16|2,16|4,8),64\]', text)
