"""Shards hold the ids that were written, or say which file does not."""

import itertools
import json
import pickle
import random
import resource

import grain
import numpy as np
import pytest

from lm.data import batches as batches_lib
from lm.data import documents as data
from lm.data import shard_index, shards


def write(folder, documents, vocab_size, count=3):
    """Writes documents into `count` shards of one split, each id as three bytes of text."""
    folder.mkdir(parents=True, exist_ok=True)
    edges = [i * len(documents) // count for i in range(count + 1)]
    found = tuple(
        shards.write_shard(
            folder / shard_index.file_name('train', i, count),
            ((ids, 3 * len(ids)) for ids in documents[start:stop]),
            vocab_size,
        )
        for i, (start, stop) in enumerate(itertools.pairwise(edges))
    )
    shard_index.write_index(folder, shard_index.Index(vocab_size, {'text': 'ab'}, {'train': found}))
    return shards.ShardedDocuments(folder, 'train')


def some_documents(vocab_size, count=20, seed=0):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, vocab_size, size) for size in rng.integers(0, 90, count)]
    return [*documents, np.array([vocab_size - 1]), np.zeros(0, int)]


@pytest.mark.parametrize('vocab_size', [1, 256, 257, 65536, 65537])
@pytest.mark.parametrize('count', [1, 4])
def test_ids_come_back(tmp_path, vocab_size, count, monkeypatch):
    monkeypatch.setattr(shards, '_OPEN_FILES', 2)
    documents = some_documents(vocab_size)
    written = write(tmp_path, documents, vocab_size, count)
    written[0]
    for found in (written, pickle.loads(pickle.dumps(written))):
        assert len(found) == len(documents)
        assert found.tokens == sum(map(len, documents)) and found.text_bytes == 3 * found.tokens
        for i in np.random.default_rng(1).permutation(len(documents)):
            assert found[i].dtype == data.id_dtype(vocab_size)
            np.testing.assert_array_equal(found[int(i)], documents[i])
        np.testing.assert_array_equal(found[-2], documents[-2])
        with pytest.raises(IndexError):
            found[len(documents)]
    # The files are what any reader of ArrayRecord takes.
    files = sorted(str(path) for path in tmp_path.glob('*.array_record'))
    plain = grain.sources.ArrayRecordDataSource(files)
    assert [np.frombuffer(r, written[0].dtype).tolist() for r in plain] == [
        ids.tolist() for ids in documents
    ]


def test_the_same_documents_give_the_same_files(tmp_path):
    write(tmp_path / 'a', some_documents(300), 300)
    write(tmp_path / 'b', some_documents(300), 300)
    names = sorted(path.name for path in (tmp_path / 'a').iterdir())
    assert len(names) == 4
    for name in names:
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()


def test_batches_are_those_of_encoded_documents(tmp_path):
    documents = some_documents(1000, 40)
    options = {'batch_size': 2, 'length': 16, 'bos': 1000, 'seed': 3, 'num_epochs': 1}
    sources = (
        write(tmp_path / 'shards', documents, 1000),
        data.EncodedDocuments.write(tmp_path / 'memory', documents, 1000),
    )
    one, other = (list(batches_lib.training_batches(source, None, **options)) for source in sources)
    assert len(one) == len(other) > 20
    for a, b in zip(one, other):
        assert all((a[name] == b[name]).all() for name in a)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no shards here \(index\.json is missing'):
        shards.ShardedDocuments(tmp_path, 'train')
    write(tmp_path, some_documents(300), 300)
    with pytest.raises(FileNotFoundError, match="no split 'test', only"):
        shards.ShardedDocuments(tmp_path, 'test')
    with pytest.raises(ValueError, match='local folder'):
        shards.ShardedDocuments('gs://bucket/shards', 'train')
    file = tmp_path / shard_index.file_name('train', 1, 3)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r'train-00001-of-00003\.array_record: damaged shard: '):
        shards.ShardedDocuments(tmp_path, 'train')
    # another shard of the same size in its place
    other = shards.write_shard(file, [(np.array([1]), 3)], 300)
    assert other.file_bytes == len(whole)
    with pytest.raises(ValueError, match=r'train-00001.*1 documents, index\.json says 7'):
        shards.ShardedDocuments(tmp_path, 'train')[10]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r'train-00001-of-00003\.array_record: this shard'):
        shards.ShardedDocuments(tmp_path, 'train')


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    documents = some_documents(300)
    write(tmp_path, documents, 300, 1)
    file = tmp_path / shard_index.file_name('train', 0, 1)
    whole, rng, noticed = file.read_bytes(), random.Random(0), 0
    for _ in range(150):
        # the records, and the index of the records at the end; between them lies padding
        at = rng.choice([rng.randrange(4000), len(whole) - 1 - rng.randrange(500)])
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        found = shards.ShardedDocuments(tmp_path, 'train')
        for i, ids in enumerate(documents):
            try:
                np.testing.assert_array_equal(found[i], ids)
            except ValueError as error:
                assert str(error).startswith(f'{file}: damaged shard: document {i}: ')
                noticed += 1
    assert noticed > 100


def test_a_damaged_index_is_named(tmp_path):
    write(tmp_path, some_documents(300), 300)
    file, rng = tmp_path / shard_index.INDEX, random.Random(0)
    whole = file.read_bytes()
    for _ in range(300):
        at = rng.randrange(len(whole))
        file.write_bytes(whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :])
        try:
            shards.ShardedDocuments(tmp_path, 'train')
        except (ValueError, FileNotFoundError) as error:
            assert str(tmp_path) in str(error)
    described = json.loads(whole)
    for name, value, message in (
        ('format', 2, 'format 2; this version reads format 1'),
        ('dtype', 'uint8', "dtype 'uint8' for 300 ids"),
        ('vocab_size', 0, 'vocab_size 0'),
        ('splits', {'train': [{'documents': 1}]}, "'tokens' is missing"),
        ('splits', {'train': [{**described['splits']['train'][0], 'tokens': 2**40}]}, 'ids in'),
        ('splits', [], 'not an index of shards'),
    ):
        file.write_text(json.dumps({**described, name: value}))
        with pytest.raises(ValueError, match=message):
            shards.ShardedDocuments(tmp_path, 'train')
    file.write_bytes(b'[' * 100_000)
    with pytest.raises(ValueError, match=r'index.json: damaged'):
        shards.ShardedDocuments(tmp_path, 'train')


def test_a_failed_write_leaves_what_was_there(tmp_path):
    file = tmp_path / 'x'
    with pytest.raises(ValueError, match=r'document 1: ids must lie in \[0, 7\)'):
        shards.write_shard(file, [(np.array([1]), 1), (np.array([7]), 1)], 7)
    assert not list(tmp_path.iterdir())
    shards.write_shard(file, [(np.array([1]), 1)], 7)
    before = file.read_bytes()

    def unreadable():
        yield np.array([2]), 1
        raise FileNotFoundError('book.txt: cannot be read')

    with pytest.raises(FileNotFoundError, match=r'^book\.txt: cannot be read$'):
        shards.write_shard(file, unreadable(), 7)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # what a full disk does to a writer
    try:
        with pytest.raises(OSError, match=r'x: could not be written: .*File too large.*; free'):
            shards.write_shard(file, ((np.zeros(50_000, int), 1) for _ in range(1000)), 7)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['x']
    with pytest.raises(OSError, match='nowhere/x: could not be written'):
        shards.write_shard(tmp_path / 'nowhere' / 'x', [(np.array([1]), 1)], 7)
