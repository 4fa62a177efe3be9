"""Pairs of documents: two sides of one pair are one segment of two neighbouring rows."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.data import pairs as pairs_lib
from lm.data.pairs import Pair
from lm.losses import next_token as losses
from lm.losses.loss import Loss, Sum
from lm.model import params, presets
from lm.training import train

BOS = 50


def some_pairs(count):
    rng = np.random.default_rng(0)
    parts = ([rng.integers(0, BOS, n) for n in rng.integers(1, 6, 3)] for _ in range(count))
    return [Pair(*ids, weight=1 + i % 3) for i, ids in enumerate(parts)]


def batches(given, **changes):
    options = {'batch_size': 4, 'length': 20, 'bos': BOS, **changes}
    return pairs_lib.pair_batches(given, None, **options)


def test_packs_the_example_of_the_docstring():
    given = [
        {'prompt': [1], 'chosen': [2, 3], 'rejected': [4]},
        {'prompt': [5], 'chosen': [6], 'rejected': [7, 8]},
    ]
    (batch,) = batches(given, batch_size=2, length=6, bos=9)
    np.testing.assert_array_equal(batch['tokens'], [[9, 1, 2, 9, 5, 0], [9, 1, 9, 5, 7, 0]])
    np.testing.assert_array_equal(batch['targets'], [[1, 2, 3, 5, 6, 0], [1, 4, 5, 7, 8, 0]])
    np.testing.assert_array_equal(batch['segments'], [[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 0]])
    np.testing.assert_array_equal(batch['weights'], [[0, 1, 1, 0, 1, 0], [0, 1, 0, 1, 1, 0]])
    np.testing.assert_array_equal(batch['positions'], [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 0]])


@pytest.mark.parametrize('options', [{}, {'seed': 3}, {'shard_index': 1, 'shard_count': 3}])
def test_every_pair_is_one_segment_of_two_rows_with_its_weight(options):
    given = some_pairs(23)
    seen = []
    for batch in batches(given, **options):
        for row in range(0, 4, 2):
            for segment in range(1, batch['segments'][row : row + 2].max() + 1):
                sides = []
                for side in (row, row + 1):
                    here = batch['segments'][side] == segment
                    (number,) = set(batch['documents'][side, here])
                    pair, answer = given[number], batch['weights'][side, here] > 0
                    targets = batch['targets'][side, here]
                    np.testing.assert_array_equal(targets[~answer], pair.prompt)
                    assert set(batch['weights'][side, here][answer]) == {pair.weight}
                    assert batch['tokens'][side, here][0] == BOS
                    np.testing.assert_array_equal(batch['tokens'][side, here][1:], targets[:-1])
                    sides.append((number, targets[answer].tolist()))
                assert sides == [
                    (number, list(given[number].chosen)), (number, list(given[number].rejected))
                ]  # fmt: skip
                seen.append(number)
    first, step = options.get('shard_index', 0), options.get('shard_count', 1)
    assert sorted(seen) == list(range(first, 23, step))
    assert (seen != sorted(seen)) == ('seed' in options)


@pytest.mark.parametrize('taken', range(5))
def test_restoring_a_state_from_json_continues_exactly(taken):
    dataset = batches(some_pairs(23), seed=1, num_epochs=2)
    whole, iterator = list(dataset), iter(dataset)
    for _ in range(taken):
        next(iterator)
    fresh = iter(dataset)
    fresh.set_state(json.loads(json.dumps(iterator.get_state())))
    jax.tree.map(np.testing.assert_array_equal, list(fresh), whole[taken:])
    assert len(whole) > 5


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match='batch_size must be even'):
        batches(some_pairs(2), batch_size=3)
    with pytest.raises(ValueError, match='2 pairs, shard 0 of 3'):
        batches(some_pairs(2), shard_count=3)
    for bad, message in (
        (Pair([1] * 15, [2] * 6, [3]), 'rows of 20'),
        (Pair([1], [], [3]), 'two answers'),
        (Pair([1], [BOS], [3]), r'ids must lie in \[0, 50\)'),
    ):
        with pytest.raises(ValueError, match=f'(pair|document) 1.*{message}'):
            list(batches([some_pairs(1)[0], bad]))


def preference_loss(weights, batch, key, config):
    """`-log sigmoid(log p(chosen) - log p(rejected))`, weighted mean over pairs."""
    del key
    nats_BL = losses.token_losses(weights, config, batch).nats * (batch['weights'] > 0)
    pairs = batch['segments'].shape[1] // 2  # more than a row holds

    def by_segment(x_BL):
        return jax.vmap(lambda x, s: jnp.zeros(pairs).at[s].add(x))(x_BL, batch['segments'])

    logp_BS = -by_segment(nats_BL)
    weight_BS = by_segment(batch['weights']) / jnp.maximum(by_segment(batch['weights'] > 0), 1)
    nats_PS = -jax.nn.log_sigmoid(logp_BS[0::2] - logp_BS[1::2])
    total, count = (nats_PS * weight_BS[0::2]).sum(), weight_BS[0::2].sum()
    return Loss(total / count, {'nats_per_pair': Sum(total, count)})


def test_a_loss_over_pairs_learns_the_preference():
    config = presets.tiny(BOS + 1)
    given = some_pairs(6)
    step = jax.jit(jax.value_and_grad(
        lambda w, batch: preference_loss(w, batch, None, config), has_aux=True
    ))  # fmt: skip
    weights = params.init(config, jax.random.key(0))
    (batch,) = batches(given, batch_size=4, length=40)
    batch.pop('documents')
    # of each pair alone, by hand
    expected = []
    for pair in given:
        logp = []
        for answer in (pair.chosen, pair.rejected):
            text = np.concatenate([pair.prompt, answer])
            row = {
                'tokens': np.array([[BOS, *text[:-1]]]), 'targets': text[None],
                'segments': np.ones((1, len(text)), np.int32),
                'positions': np.arange(len(text))[None],
            }  # fmt: skip
            nats = losses.token_losses(weights, config, row).nats[0]
            logp.append(-float(nats[len(pair.prompt) :].sum()))
        expected.append(pair.weight * np.log1p(np.exp(logp[1] - logp[0])))
    values = []
    for _ in range(10):
        (value, sums), gradient = step(weights, batch)
        values.append(float(value))
        weights = jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradient)
        if len(values) == 1:
            assert float(sums['nats_per_pair'].count) == sum(pair.weight for pair in given)
            np.testing.assert_allclose(sums['nats_per_pair'].total, sum(expected), rtol=1e-4)
    assert values[-1] < 0.5 * values[0]
    assert set(train.evaluate(
        lambda w, batch, key: preference_loss(w, batch, key, config), weights,
        [batch], jax.make_mesh((1, 1, 1), ('data', 'sequence', 'model'),
                               axis_types=(jax.sharding.AxisType.Auto,) * 3,
                               devices=jax.devices()[:1]),
    )) == {'nats_per_pair'}  # fmt: skip
