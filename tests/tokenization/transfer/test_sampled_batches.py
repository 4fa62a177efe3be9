"""Batches with one tokenizer each: functions of their number, resumable, equal on all hosts."""

import json

import numpy as np
import pytest

from experiments import corpora
from tokenization.transfer import sampled, substrings
from tokenization.transfer.decompose import decompose
from tokenization.transfer.sampled_batches import SampledBatches, Settings, sampled_batches
from tokenization.vocabularies.byte import ByteTokenizer

SETTINGS = Settings(
    batch_size=4, length=24, text_bytes=200, vocab_size=400, pieces=3, steps=20, seed=5
)


@pytest.fixture(scope='module')
def documents() -> list[bytes]:
    library = corpora.standard_library()
    return [*(library.train[i] for i in range(30)), b'short', 'é漢'.encode() * 500]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_rows_are_texts_in_ids_of_the_tokenizer(documents):
    source = SampledBatches(documents, ByteTokenizer(), SETTINGS)
    for step in (0, 7, 19):
        batch, tokenizer, texts = source[step], source.tokenizer(step), source.texts(step)
        queue = [text for k in range(16) for text in source.texts((step - k) % 20)]
        again = sampled.sample(substrings.count(queue), 400, (5, 2, step))
        assert tokenizer.tokens == again.tokens
        pieces_VP = batch['pieces'].array
        assert pieces_VP.shape == (401, 3) and pieces_VP.dtype == np.int32
        np.testing.assert_array_equal(
            pieces_VP, decompose(ByteTokenizer(), [*tokenizer.tokens, b''], 3)
        )
        assert np.all(pieces_VP[400] == -1)
        for row, text in enumerate(texts):
            assert text.decode()  # cut between characters
            size = int(batch['weights'][row].sum())
            ids = batch['targets'][row, :size]
            assert text.startswith(tokenizer.decode(ids))
            assert size == 24 or tokenizer.decode(ids) == text
            assert batch['tokens'][row, 0] == 400
            np.testing.assert_array_equal(batch['tokens'][row, 1:size], ids[:-1])
            np.testing.assert_array_equal(batch['positions'][row, :size], np.arange(size))
            assert np.all(batch['segments'][row] == batch['weights'][row])
            for name in ('tokens', 'targets', 'positions'):
                assert not batch[name][row, size:].any()


def test_hosts_share_the_tokenizer_and_not_the_texts(documents):
    whole = SampledBatches(documents, ByteTokenizer(), SETTINGS)[3]
    halves = [
        SampledBatches(
            documents,
            ByteTokenizer(),
            SETTINGS._replace(batch_size=2, shard_index=i, shard_count=2),
        )[3]
        for i in range(2)
    ]
    for batch in halves:
        np.testing.assert_array_equal(batch.pop('pieces').array, whole['pieces'].array)
    both = {name: np.concatenate([batch[name] for batch in halves]) for name in halves[0]}
    assert equal(both, {name: whole[name] for name in both})


def test_resumed_exactly(documents):
    source = SampledBatches(documents, ByteTokenizer(), SETTINGS)
    batches = sampled_batches(documents, ByteTokenizer(), SETTINGS)
    iterator = iter(batches)
    for step in range(3):
        assert equal(next(iterator), source[step])
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = iter(batches)
    resumed.set_state(state)
    for step in range(3, 6):
        assert equal(next(resumed), source[step])


def test_workers_change_no_batch(documents):
    source = SampledBatches(documents, ByteTokenizer(), SETTINGS)
    iterator = iter(sampled_batches(documents, ByteTokenizer(), SETTINGS, workers=2))
    for step in range(5):
        assert equal(next(iterator), source[step])
    json.dumps(iterator.get_state())
    iterator.close()


def test_epochs_differ_and_runs_end(documents):
    source = SampledBatches(documents, ByteTokenizer(), SETTINGS._replace(steps=16))
    assert len(source) == 16
    assert len(list(sampled_batches(documents, ByteTokenizer(), SETTINGS._replace(steps=3)))) == 3
    texts = [text for step in range(16) for text in source.texts(step)]  # two epochs of documents
    assert len(set(texts) - {b'short'}) > 55


@pytest.mark.parametrize(
    ('changed', 'message'),
    [
        ({'batch_size': 0}, 'batch_size must be at least 1'),
        ({'length': 1}, 'rows of at least 2 tokens'),
        ({'vocab_size': 255}, 'vocabulary of at least 256'),
        ({'shard_index': 1}, 'shard 1 of 1'),
    ],
)
def test_sizes_that_cannot_work(documents, changed, message):
    with pytest.raises(ValueError, match=message):
        sampled_batches(documents, ByteTokenizer(), SETTINGS._replace(**changed))
    with pytest.raises(ValueError, match='no documents'):
        sampled_batches([], ByteTokenizer(), SETTINGS)


def test_too_few_substrings():
    source = SampledBatches([b'a few words'], ByteTokenizer(), SETTINGS)
    with pytest.raises(ValueError, match='batch 2: 400 tokens asked for'):
        source[2]
