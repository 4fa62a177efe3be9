"""The parts of the comparison that could be wrong without failing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import language_model, resume
from experiments.equal_info import config as config_lib
from experiments.equal_info import measure, models, results
from lm.losses import next_token as losses
from lm.model import contract, params, presets, transformer
from tokenization.vocabularies.byte import ByteTokenizer


def test_losses_of_the_bits_add_up_to_the_loss_of_the_token():
    config = dataclasses.replace(presets.tiny(16), n_layers=1)
    weights = params.init(config, jax.random.key(0))
    shape = (2, 6)
    batch = {
        'tokens': jax.random.randint(jax.random.key(1), shape, 0, 16),
        'targets': jax.random.randint(jax.random.key(2), shape, 0, 16),
        'segments': jnp.ones(shape, jnp.int32),
        'positions': jnp.broadcast_to(jnp.arange(6), shape),
        'weights': jnp.asarray([[1.0] * 6, [1.0] * 3 + [0.0] * 3]),
    }
    bits, right = language_model.bit_losses(weights, config, batch, bits=4)
    nats = losses.next_token_loss(weights, config, batch).sums['nats_per_token'].total
    np.testing.assert_allclose(bits.sum() * np.log(2), nats, rtol=1e-5)
    assert (right <= 9).all() and (bits > 0).all()


def test_the_first_bit_is_the_highest():
    config = dataclasses.replace(presets.tiny(4), n_layers=1)
    weights = params.init(config, jax.random.key(0))
    x = {name: jnp.zeros((1, 1), jnp.int32) for name in ('tokens', 'positions', 'segments')}
    h = transformer.read(weights, config, contract.chain(x['tokens'])).h_BTD[0, 0]
    weights['tables']['output_VD'] = jnp.stack([-h, -h, h, h])  # ids 2 and 3 get all the mass
    batch = {**x, 'targets': jnp.full((1, 1), 3), 'weights': jnp.ones((1, 1))}
    bits, right = language_model.bit_losses(weights, config, batch, bits=2)
    np.testing.assert_allclose(bits, [0.0, 1.0], atol=1e-3)
    assert right[0] == 1


def test_equal_compute_means_equal_flops():
    config = config_lib.SCALES['demo']
    flops = []
    for vocab_size in (256, 65_536):
        run = models.same_compute(config, vocab_size)
        model = language_model.with_vocabulary(config.m2, vocab_size)
        flops.append(run.steps * params.flops_per_token(model, run.length))
    assert flops[0] == pytest.approx(flops[1], rel=0.02)


def test_pieces_join_to_the_documents():
    documents = [b'', b'a', bytes(range(10)), b'xyzw']
    parts = models.pieces(documents, 4)
    assert [len(part) for part in parts] == [1, 4, 4, 2, 4]
    assert b''.join(part.astype(np.uint8).tobytes() for part in parts) == b''.join(documents)


def test_padded_batches_hold_each_piece_once_after_bos():
    rows = models.pieces([b'abcdef', b'xy'], 4)
    batches = list(models.padded_batches(rows, 4, 2))
    targets = np.concatenate([b['targets'][b['weights'] > 0] for b in batches])
    assert targets.astype(np.uint8).tobytes() == b'abcdefxy'
    assert all((b['tokens'][:, 0] == 256).all() for b in batches)
    np.testing.assert_array_equal(batches[0]['tokens'][:, 1:], batches[0]['targets'][:, :-1])


def test_unigram_bits_per_byte_by_hand():
    # add-one counts: 3, 2, 1, 1 of 7; the held-out ids 0 and 2 cost log2(7/3) + log2(7)
    train, held_out = [np.array([0, 0, 1])], [np.array([0, 2])]
    expected = (np.log2(7 / 3) + np.log2(7)) / 10
    assert measure.unigram_bits_per_byte(train, held_out, 4, 10) == pytest.approx(expected)


def test_a_round_trip_that_fails_is_counted():
    class Forgetful(ByteTokenizer):
        def decode(self, ids):
            return super().decode(ids).replace(b'e', b'')

    metrics = measure.encoded(Forgetful(), [b'see', b'by', b'me', b'so']).metrics
    assert metrics['round_trip_fraction'] == 0.5
    assert metrics['bytes_per_token'] == 1 and metrics['uniform_bits_per_byte'] == 8


def test_a_folder_of_another_run_is_refused(tmp_path):
    config = config_lib.SCALES['tiny']
    resume.claim(tmp_path, config)
    resume.claim(tmp_path, config)
    with pytest.raises(ValueError, match='another ngram_order'):
        resume.claim(tmp_path, dataclasses.replace(config, ngram_order=2))


def test_claims_that_do_not_hold_say_so():
    row = {'bits_per_byte': 1.0, 'uniform_bits_per_byte': 2.0, 'unigram_bits_per_byte': 1.5}
    rows = {name: dict(row) for name in results.ROWS}
    lines = results.claims(rows)
    assert lines[0].startswith('NOT SHOWN') and lines[1].startswith('shown')
