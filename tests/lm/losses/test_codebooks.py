"""Several ids per position, from documents `[T, Q]` to a loss per codebook."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.data import batches as batches_lib
from lm.devices import mesh
from lm.losses import next_token as losses
from lm.model import config as config_lib
from lm.model import params, presets, tables, transformer
from lm.model.config import Lexinvariant
from lm.training import metrics, train
from lm.training.optimizer import OptimizerConfig

Q, BOS = 3, 16
CONFIG = dataclasses.replace(presets.tiny(BOS + 1), codebooks=Q, logit_softcap=5.0)
rng = np.random.default_rng(0)
DOCUMENTS = [rng.integers(0, BOS, (n, Q)) for n in (5, 0, 17, 3, 9)]


def packed(length=8):
    return list(
        batches_lib.evaluation_batches(
            DOCUMENTS, None, batch_size=2, length=length, bos=BOS, codebooks=Q
        )
    )


def test_packing_is_that_of_each_codebook_alone():
    whole = packed()
    for q in range(Q):
        alone = batches_lib.evaluation_batches(
            [ids[:, q] for ids in DOCUMENTS], None, batch_size=2, length=8, bos=BOS
        )
        for batch, one in zip(whole, alone, strict=True):
            for name in ('tokens', 'targets'):
                assert batch[name].dtype == np.int32
                np.testing.assert_array_equal(batch[name][..., q], one[name])
            for name in ('segments', 'positions', 'weights', 'documents'):
                np.testing.assert_array_equal(batch[name], one[name])


def test_documents_of_another_number_of_codebooks_are_refused():
    with pytest.raises(ValueError, match=r'document 0: expected \[T, 3\] of integer ids'):
        list(
            batches_lib.evaluation_batches(
                [np.zeros((4, 2), int)], None, batch_size=1, length=4, bos=BOS, codebooks=Q
            )
        )


@pytest.mark.parametrize('tied', [False, True])
def test_the_loss_is_the_sum_over_codebooks_of_the_dense_one(tied):
    config = dataclasses.replace(CONFIG, tied=tied)
    weights = params.init(config, jax.random.key(0))
    assert set(weights['tables']) == {'input_QVD'} | ({'output_QVD'} if not tied else set())
    batch = packed()[0]
    logits = transformer.forward(
        weights, config, batch['tokens'], batch['positions'], batch['segments']
    )
    assert logits.shape == (2, 8, Q, BOS + 1)
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch['targets'][..., None], -1)[..., 0]
    nats_Q = (nats * batch['weights'][..., None]).sum((0, 1))
    value, sums = losses.next_token_loss(weights, config, batch)
    tokens = batch['weights'].sum()
    np.testing.assert_allclose(value, nats_Q.sum() / tokens, rtol=1e-5)
    np.testing.assert_allclose(sums['nats_per_token'].mean, value, rtol=1e-6)
    for q in range(Q):
        found = sums[f'nats_per_token/codebook={q}']
        np.testing.assert_allclose(found.total, nats_Q[q], rtol=1e-5)
        assert found.count == tokens


def test_vectors_are_sums_of_rows():
    weights = params.init(CONFIG, jax.random.key(0))
    tokens = jnp.array([[[1, 2, 3]]])
    table = weights['tables']['input_QVD']
    x = tables.embed(weights['tables'], CONFIG, tokens)[0, 0]
    np.testing.assert_allclose(x, table[0, 1] + table[1, 2] + table[2, 3], rtol=1e-6)


def test_a_run_on_a_mesh_learns_and_reports_each_codebook(tmp_path):
    grid = mesh.make('data=2,model=2', jax.devices()[:4])
    dataset = batches_lib.training_batches(
        DOCUMENTS, None, batch_size=4, length=8, bos=BOS, seed=0, codebooks=Q
    )
    config = train.TrainConfig(
        steps=6, batch_size=4, length=8, log_every=1,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
    )  # fmt: skip
    init = jax.jit(
        functools.partial(params.init, CONFIG), out_shardings=params.shardings(CONFIG, grid)
    )
    state = train.run(
        config, init, lambda w, batch, key: losses.next_token_loss(w, CONFIG, batch), dataset,
        tmp_path / 'run', grid, leaves=params.leaves(CONFIG),
    )  # fmt: skip
    assert state.params['tables']['input_QVD'].sharding.shard_shape((Q, 17, 64)) == (Q, 17, 32)
    records = metrics.read_jsonl(tmp_path / 'run' / 'metrics.jsonl')
    each = [records[-1][f'nats_per_token/codebook={q}'] for q in range(Q)]
    assert sum(each) == pytest.approx(records[-1]['nats_per_token'], rel=1e-5)
    assert records[-1]['nats_per_token'] < records[0]['nats_per_token']


def test_configs_of_one_codebook_are_serialised_as_before():
    assert 'codebooks' not in config_lib.to_dict(presets.tiny())
    assert config_lib.from_dict(config_lib.to_dict(CONFIG)) == CONFIG


def test_invalid_settings_are_refused():
    weights = params.init(CONFIG, jax.random.key(0))
    with pytest.raises(ValueError, match='codebooks: 3; decoding writes one id per position'):
        tables.for_texts(weights['tables'], CONFIG, jax.random.split(jax.random.key(0), 2))
    with pytest.raises(ValueError, match='codebooks: 0'):
        dataclasses.replace(CONFIG, codebooks=0)
    with pytest.raises(ValueError, match='codebooks: 3; expected 1'):
        dataclasses.replace(CONFIG, tied=True, lexinvariant=Lexinvariant())
