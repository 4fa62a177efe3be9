"""Shards depend only on text and tokenizer, no matter how and by how many workers."""

import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath

from experiments import corpora, run
from experiments.bench_tokenize import config as bench_config
from experiments.bench_tokenize import main as bench
from experiments.tokenize import main as tokenize
from experiments.tokenize import plan
from experiments.tokenize.config import Config
from lm.data.shard_index import read_index
from lm.data.shards import ShardedDocuments
from lm.files import provenance
from tokenization.vocabularies.bpe import BPETokenizer
from tokenization.vocabularies.byte import ByteTokenizer

SHARD = 1 << 17


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """Some files, one long and one not text, and a tokenizer whose ids take two bytes."""
    folder = tmp_path_factory.mktemp('source')
    (folder / 'text').mkdir()
    long = b''.join(b'the %d cats sat on %d mats.\n' % (i, i * i) for i in range(16_000))
    files = {f'{i}.txt': long[i * 999 : i * 999 + 5000] for i in range(12)}
    files |= {'long.txt': long, 'noise.txt': np.random.default_rng(0).bytes(90_000)}
    for name, content in files.items():
        (folder / 'text' / name).write_bytes(content)
    BPETokenizer.train([long[:20_000]], 300).save(folder / 'bpe')
    return folder


def call(source, out, *flags, tokenizer='bpe', text='text/*.txt'):
    return run.main([
        'tokenize', '--data', f'{source}/{text}', '--tokenizer', str(source / tokenizer),
        '--shard-bytes', str(SHARD), '--out', str(out), *flags,
    ])  # fmt: skip


def content(folder):
    """Returns all files of a folder, including hidden ones."""
    folder = pathlib.Path(folder)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file()
    }


@pytest.fixture(scope='module')
def whole(source, tmp_path_factory):
    """Shards written by one process, undisturbed."""
    out = tmp_path_factory.mktemp('whole') / 'shards'
    assert call(source, out) == 0
    return out


def test_shards_hold_the_documents_of_the_corpus(source, whole):
    corpus = corpora.open_corpus(f'{source}/text/*.txt')
    tokenizer = BPETokenizer.load(source / 'bpe')
    index = read_index(whole)
    assert len(index.splits['train']) == 6 and index.vocab_size == tokenizer.vocab_size == 300
    again = corpora.open_corpus(str(whole))
    for split in ('train', 'valid', 'test'):
        documents = getattr(corpus, split)
        found = ShardedDocuments(whole, split)
        assert len(found) == len(documents) > 0
        for ids, document in zip(found, documents):
            assert ids.dtype == np.dtype('<u2')
            np.testing.assert_array_equal(ids, tokenizer.encode(document))
        assert list(getattr(again, split)) == list(documents)
        assert found.text_bytes == sum(map(len, documents))
        assert list(getattr(again, split)[1:]) == list(documents[1:])
    assert found.tokens == sum(shard.tokens for shard in index.splits['test'])


@pytest.mark.parametrize(
    'runs',
    [
        [['--workers', '2']],
        [['--hosts', '3', '--host', str(i)] for i in (2, 0, 1)],
        pytest.param(
            [['--beam', 'runner=DirectRunner']],
            marks=pytest.mark.skipif(
                importlib.util.find_spec('apache_beam') is None, reason='make test-beam'
            ),
        ),
    ],
    ids=['workers', 'hosts', 'beam'],
)
def test_who_writes_changes_nothing(source, whole, tmp_path, runs):
    for flags in runs:
        assert not (tmp_path / 'shards' / 'index.json').exists()
        assert call(source, tmp_path / 'shards', *flags) == 0
    assert content(tmp_path / 'shards') == content(whole)


def test_a_second_run_writes_only_what_is_missing(source, whole, tmp_path):
    out = tmp_path / 'shards'
    shutil.copytree(whole, out)

    def times():
        return {path.name: path.stat().st_mtime_ns for path in out.glob('*.array_record')}

    before = times()
    assert call(source, out) == 0 and times() == before
    names = sorted(before)
    (out / names[0]).unlink()
    (out / names[1]).write_bytes(b'cut short')
    (out / 'parts' / names[2].replace('.array_record', '.json')).write_text('{')
    (out / '.left-by-a-kill.tmp').write_text('half')
    assert call(source, out) == 0
    assert [name for name in names if times()[name] != before[name]] == names[:3]
    assert content(out) == content(whole)


def test_sigkill_loses_no_finished_shard_and_leaves_no_worker(source, tmp_path):
    text = tmp_path / 'text'
    text.mkdir()
    for i in range(3):
        long = (source / 'text' / 'long.txt').read_bytes()
        (text / f'{i}.txt').write_bytes(long * 3)
    flags = ['--workers', '2']
    out = tmp_path / 'killed'
    command = [
        sys.executable, '-m', 'experiments.run', 'tokenize', '--data', f'{text}/*.txt',
        '--tokenizer', str(source / 'bpe'), '--shard-bytes', str(SHARD), '--out', str(out), *flags,
    ]  # fmt: skip
    started = subprocess.Popen(
        command, cwd=provenance.ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob('parts/*.json'))) < 4:
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.005)
    started.kill()
    started.wait()
    while group_is_alive(started.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob('parts/*.json')}
    assert not (out / 'index.json').exists()
    for part in out.glob('parts/*.json'):
        size = json.loads(part.read_text())['file_bytes']
        assert (out / f'{part.stem}.array_record').stat().st_size == size
    assert call(tmp_path, out, tokenizer=source / 'bpe') == 0
    assert all((out / 'parts' / name).stat().st_mtime_ns == kept[name] for name in kept)
    assert call(tmp_path, tmp_path / 'undisturbed', tokenizer=source / 'bpe') == 0
    assert content(out) == content(tmp_path / 'undisturbed')


def group_is_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def refused(capsys, code=1):
    assert code
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1 and 'Traceback' not in error
    return error


def test_what_cannot_work_is_refused_before_anything_is_written(
    source, whole, tmp_path, capsys, monkeypatch
):
    before, out = content(whole), tmp_path / 'out'

    def error(*arguments, **options):
        return refused(capsys, call(source, *arguments, **options))

    assert 'matches no file' in error(out, text='nothing/*')
    assert 'no tokenizer here' in error(out, tokenizer='text')
    assert not out.exists()
    assert 'holds shards of another text;' in error(whole, text='text/1*.txt')
    ByteTokenizer().save(tmp_path / 'bytes')
    assert 'of another tokenizer;' in error(whole, tokenizer=tmp_path / 'bytes')
    assert 'exists and holds no shards' in error(source / 'text')
    with pytest.raises(ValueError, match='--host 2: expected 0 to 1'):
        Config('bytes', hosts=2, host=2)
    monkeypatch.setattr(plan.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10, 0, 10))
    assert 'shards need about 0.0 GB' in error(out)
    assert not list(out.glob('*.array_record'))
    assert content(whole) == before


def test_unfinished_shards_cannot_be_read(source, tmp_path, capsys):
    assert call(source, tmp_path / 'shards', '--hosts', '2', '--host', '0') == 0
    assert 'of other hosts are missing, train-00001-of-00006' in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r'index\.json is missing; it is written when all'):
        corpora.open_corpus(str(tmp_path / 'shards'))


def test_a_damaged_tokenizer_is_noticed(source, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / 'shards')
    file = tmp_path / 'shards' / 'tokenizer' / 'tessera.json'
    file.write_text(file.read_text().replace('300', '299'))
    with pytest.raises(ValueError, match='tokenizer: not the tokenizer that made these shards'):
        corpora.open_corpus(str(tmp_path / 'shards'))
    assert 'not the tokenizer that made' in refused(capsys, call(source, tmp_path / 'shards'))


def test_changed_text_of_the_same_size_is_noticed(source, tmp_path, capsys):
    shutil.copytree(source / 'text', tmp_path / 'text')
    call(tmp_path, tmp_path / 'shards', tokenizer=source / 'bpe')
    file = tmp_path / 'text' / '3.txt'
    file.write_bytes(file.read_bytes()[::-1])
    code = call(tmp_path, tmp_path / 'shards', tokenizer=source / 'bpe')
    assert 'holds shards of another text;' in refused(capsys, code)


def test_a_tokenizer_that_loses_text_is_refused(source, tmp_path):
    class Lossy(ByteTokenizer):
        def decode(self, ids):
            return super().decode(ids).lower()

    corpus = corpora.open_corpus(f'{source}/text/*.txt')
    with pytest.raises(ValueError, match='is not restored from its ids'):
        plan.make(corpus, Lossy(), SHARD, tmp_path)


def test_a_lost_worker_is_explained(source, tmp_path, monkeypatch):
    config = Config(
        str(source / 'bpe'), f'{source}/text/*.txt', shard_bytes=SHARD, workers=2, hosts=1, host=0
    )
    monkeypatch.setattr(tokenize, '_measured', lost)
    with pytest.raises(ChildProcessError, match=r'a worker was killed.*fewer --workers'):
        tokenize.main(config, epath.Path(tmp_path / 'shards'))


def lost(task):
    """Ends a worker as the operating system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_memory_does_not_grow_with_the_text(tmp_path):
    tiny = bench_config.SCALES['tiny']
    found = bench.main(tiny, epath.Path(tmp_path))
    small, large = (found[f'peak/times_{times}/workers=1'] for times in (1, 10))
    assert tiny.megabytes * 9 > 50
    assert abs(large - small) < 15


def test_pretraining_over_shards_is_pretraining_over_their_text(source, tmp_path):
    few = 'text/[0-9]*.txt'
    assert call(source, tmp_path / 'ids', text=few) == 0
    # On one device, and in one process, so that shared programs are compiled once.
    runs = [
        ['pretrain', '--scale', 'tiny', '--out', f'{tmp_path}/{name}', '--data', data, *flags]
        for name, data, flags in (
            ('text', f'{source}/{few}', ['--tokenizer', f'{source}/bpe']),
            ('shards', f'{tmp_path}/ids', []),
        )
    ]
    script = f'from experiments import run; assert not any([run.main(a) for a in {runs}])'
    done = subprocess.run(
        [sys.executable, '-c', script], cwd=provenance.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    text, shards = (
        {
            'params': json.loads((tmp_path / name / 'bundle/config.json').read_text())['digest'],
            **json.loads((tmp_path / name / 'result.json').read_text()),
        }
        for name in ('text', 'shards')
    )
    assert 1 < text['bits_per_byte/model'] < 16
    assert {**text, 'train_seconds/model': 0} == {**shards, 'train_seconds/model': 0}
    assert (tmp_path / 'text' / 'encoded').exists()
    assert not (tmp_path / 'shards' / 'encoded').exists()  # the shards are used directly
