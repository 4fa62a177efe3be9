"""Corpora keep every byte of their files, and are split identically on every machine."""

import itertools
import os
import pickle
import random
import subprocess
import sys
import textwrap

import pytest

from experiments import corpora, file_documents


def write(folder, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)


def contents(corpus: corpora.Corpus) -> list[bytes]:
    """Returns all documents, in the order of the splits."""
    return [document for split in corpus[1:] for document in split]


def test_standard_library_is_split_by_relative_path():
    corpus = corpora.standard_library()
    paths = [{span.path for span in split.spans} for split in corpus[1:]]
    assert not paths[0] & paths[1] and not paths[0] & paths[2] and not paths[1] & paths[2]
    sizes = [sum(stop - start for _, start, stop in split.spans) for split in corpus[1:]]
    assert 8e6 < sum(sizes) < 2e7
    assert sizes[0] > 0.8 * sum(sizes) and min(sizes) > 0.01 * sum(sizes)
    everything = {path for part in paths for path in part}
    assert any(path.endswith('pydoc_data/topics.py') for path in everything)
    assert not any('site-packages' in p or 'sysconfigdata' in p for p in everything)
    assert all(path.endswith('.py') for path in everything)
    assert corpora.standard_library() == corpus
    # Must never change: another hash would move test text of old bundles into training.
    assert any(path.endswith('/chunk.py') for path in paths[2]) or sys.version_info >= (3, 13)


def test_a_missing_library_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora.sysconfig, 'get_paths', lambda: {'stdlib': str(tmp_path)})
    with pytest.raises(ValueError, match='no standard library source here'):
        corpora.standard_library()


def test_many_files_are_split_by_name_alone(tmp_path):
    files = {f'{i % 7}/{i}.txt': b'%d\x00\xff' % i for i in range(200)}
    one = corpora.text_files(write(tmp_path / 'one', files) + '/**/*.txt')
    assert sorted(contents(one)) == sorted(files.values())
    assert 150 < len(one.train) < 195
    other = corpora.text_files(write(tmp_path / 'other', files) + '/**/*.txt')
    assert contents(one) == contents(other)
    # Adding a file does not move any other.
    write(tmp_path / 'other', {'new.txt': b'new'})
    more = corpora.text_files(str(tmp_path / 'other') + '/**/*.txt')
    assert [d for d in contents(more) if d != b'new'] == contents(one)


@pytest.mark.parametrize('count', [3, 4, 13])
def test_few_files_still_fill_every_split(tmp_path, count):
    folder = write(tmp_path, {f'{i}.txt': b'%d' % i for i in range(count)})
    corpus = corpora.text_files(f'{folder}/*.txt')
    assert min(map(len, corpus[1:])) >= 1
    assert sorted(contents(corpus)) == sorted(b'%d' % i for i in range(count))


@pytest.mark.parametrize('line', [b'a line\n', b'\xff\x00 no line break ', b'x' * 3000 + b'\n'])
def test_one_big_file_is_divided_by_position(tmp_path, line):
    text = line * (300_000 // len(line))
    path = write(tmp_path, {'book.txt': text}) + '/book.txt'
    corpus = corpora.text_files(path)
    assert b''.join(contents(corpus)) == text
    assert max(map(len, contents(corpus))) <= file_documents.MAX_DOCUMENT
    shares = [sum(map(len, split)) / len(text) for split in corpus[1:]]
    assert shares == pytest.approx([0.9, 0.05, 0.05], abs=0.02)
    if line.endswith(b'\n'):
        assert all(document.endswith(b'\n') for document in contents(corpus))
    everything, count = list(corpus.train), len(corpus.train)
    for start, stop in ((0, count), (1, 3), (2, 2), (3, count + 9), (-2, None)):
        part = corpus.train[start:stop]
        assert list(part) == everything[start:stop]
        assert list(part[1:2]) == everything[start:stop][1:2]
    assert pickle.loads(pickle.dumps(corpus)) == corpus


@pytest.mark.parametrize('size', [1, 7, 8, 9, 15, 16, 17, 31, 32, 100])
def test_documents_join_to_their_file_wherever_lines_end(tmp_path, monkeypatch, size):
    monkeypatch.setattr(file_documents, 'MAX_DOCUMENT', 12)
    monkeypatch.setattr(file_documents, '_LOOK_BACK', 4)
    monkeypatch.setattr(file_documents, '_STEP', 8)
    for seed in range(20):
        text = bytes(random.Random(seed).choices(b'a\n', (3, 1), k=size))
        (tmp_path / 'a').write_bytes(text)
        span = file_documents.Span(str(tmp_path / 'a'), 0, size)
        documents = list(file_documents.FileDocuments((span,)))
        assert b''.join(documents) == text
        assert all(0 < len(document) <= 12 for document in documents)
        for before, after in itertools.pairwise(documents):
            # cut at a line break, unless there is none within reach
            assert before.endswith(b'\n') or b'\n' not in before[-4:], (before, after)


def test_parts_of_a_corpus_have_about_as_many_bytes(tmp_path):
    sizes = [1, 700_000, 30, 30, 64, 200_000, 5]
    spans = []
    for i, size in enumerate(sizes):
        (tmp_path / str(i)).write_bytes(b'x' * size)
        spans.append(file_documents.Span(str(tmp_path / str(i)), 0, size))
    documents = file_documents.FileDocuments(tuple(spans))
    assert documents.size == sum(sizes)
    starts = documents.starts(5)
    assert starts[0] == 0 and starts[-1] == len(documents)
    parts = [documents[a:b] for a, b in itertools.pairwise(starts)]
    assert [d for part in parts for d in part] == list(documents)
    assert all(abs(sum(map(len, p)) - sum(sizes) / 5) <= 1 << 16 for p in parts)
    assert len(parts[0].spans) < len(spans)  # a part keeps only the spans it needs
    assert documents.starts(1) == [0, len(documents)]


def test_what_cannot_be_a_corpus_is_named(tmp_path):
    with pytest.raises(ValueError, match=r'nothing\*.*matches no file'):
        corpora.text_files(str(tmp_path / 'nothing*'))
    with pytest.raises(ValueError, match=r'for the files of a folder write .*/\*'):
        corpora.text_files(str(tmp_path))
    for content in (b'', b'x', b'\n'):
        path = write(tmp_path, {'small.txt': content}) + '/small.txt'
        with pytest.raises(ValueError, match=r'small\.txt: the train split is empty|valid split'):
            corpora.text_files(path)
    with pytest.raises(ValueError, match='give one of the two'):
        corpora.open_corpus('a', 'b')


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    write(tmp_path, {'a.txt': b'a', 'b.txt': b'b', 'c.txt': b'c'})
    corpus = corpora.text_files(f'{tmp_path}/*.txt')
    write(tmp_path, {'a.txt': b'', 'b.txt': b'', 'c.txt': b''})
    with pytest.raises(ValueError, match=r'[abc]\.txt: shorter than'):
        corpus.train[0]
    (tmp_path / 'd.txt').symlink_to('missing')
    with pytest.raises(FileNotFoundError, match=r'd\.txt: cannot be read'):
        corpora.text_files(f'{tmp_path}/*.txt')
    (tmp_path / 'd.txt').unlink()
    monkeypatch.setattr(file_documents.os, 'access', lambda path, mode: False)
    with pytest.raises(PermissionError, match=r'[abc]\.txt: no permission'):
        corpora.text_files(f'{tmp_path}/*.txt')


def test_open_corpus_reads_the_flags(tmp_path):
    folder = write(tmp_path, {f'{i}.txt': b'%d' % i for i in range(5)})
    assert len(contents(corpora.open_corpus(data=f'{folder}/*'))) == 5
    assert corpora.open_corpus().name == 'standard_library'


TFDS = """
    import pickle, sys

    import numpy as np
    import tensorflow_datasets as tfds
    from etils import epath

    from experiments import corpora
    from experiments.tokenize import plan
    from tokenization.vocabularies.byte import ByteTokenizer

    class TinyText(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version('1.0.0')
        SPLITS = ('train', 'test')
        FEATURES = {'title': tfds.features.Text(), 'text': tfds.features.Text()}

        def _info(self):
            features = tfds.features.FeaturesDict(self.FEATURES)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in self.SPLITS}

        def _generate_examples(self, split):
            for i in range(40):
                row = {'title': f'{i}', 'text': f'{split} {i} \\u00e9\\x00'}
                yield i, {name: row[name] for name in self.FEATURES}

    class TinyTitles(TinyText):
        SPLITS = ('train',)
        FEATURES = {'title': tfds.features.Text()}

    class TinyNumbers(TinyText):
        SPLITS = ('train',)
        FEATURES = {'title': tfds.features.Scalar(np.int32)}

    def rows(split, numbers):
        return sorted(f'{split} {i} \\u00e9\\x00'.encode() for i in numbers)

    corpus = corpora.tfds_source('tiny_text', data_dir=sys.argv[1])
    assert [len(split) for split in corpus[1:]] == [38, 2, 40], corpus
    assert sorted([*corpus.train, *corpus.valid]) == rows('train', range(40))
    assert sorted(corpus.test) == rows('test', range(40))
    again = pickle.loads(pickle.dumps(corpus))
    assert again.train[3] == corpus.train[3] == corpus.train[-35] == corpus.train[2:4][1]
    part = pickle.loads(pickle.dumps(corpus.train[5:9]))
    assert list(part) == list(corpus.train)[5:9] and list(part[1:3]) == list(corpus.train)[6:8]
    assert corpus.train.starts(2) == [0, 19, 38]
    assert 38 * 14 < corpus.train.size < 38 * 200, corpus.train.size
    assert corpus.train.identity() != corpus.valid.identity()

    out = epath.Path(sys.argv[1]) / 'shards'
    planned = plan.make(corpus, ByteTokenizer(), 1 << 17, out)
    plan.begin(planned, ByteTokenizer(), 1 << 17)
    for task in planned.tasks:
        plan.write(pickle.loads(pickle.dumps(task)))
    assert not plan.finish(planned)[1]
    again = corpora.open_corpus(str(out))
    assert [list(split) for split in again[1:]] == [list(split) for split in corpus[1:]]

    corpus = corpora.tfds_source('tiny_titles:1.0.0', data_dir=sys.argv[1])
    assert [len(split) for split in corpus[1:]] == [36, 2, 2]
    for name in ('tiny_number', 'tiny_numbers'):
        try:
            corpora.tfds_source(name, data_dir=sys.argv[1])
        except ValueError as error:
            print(error)
    assert 'tensorflow' not in sys.modules
"""


def test_tfds_by_name_without_tensorflow(tmp_path):
    # In a new process, so that TFDS imports elsewhere do not hide a missing import here.
    script = tmp_path / 'script.py'
    script.write_text(textwrap.dedent(TFDS))
    root = os.path.dirname(os.path.dirname(corpora.__file__))
    result = subprocess.run(
        [sys.executable, script, tmp_path / 'data'],
        env={**os.environ, 'PYTHONPATH': root},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert (
        "'tiny_number': no TFDS dataset has this name; similar names: tiny_number" in result.stdout
    )
    assert 'tiny_numbers: expected a text feature called "text"' in result.stdout
