"""The compressor's command line: lossless, and with a clear message for every refused file."""

import pytest

from experiments import run
from lm.checkpoints import bundle
from lm.model import params, presets
from tokenization.coding import ngram
from tokenization.vocabularies.byte import ByteTokenizer

TEXT = b'the cat sat on the mat; the rat sat on the cat. \x00\xff' * 20


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp('models')
    ngram.count([TEXT], 2).save(folder / 'ngram')
    ngram.count([TEXT + b'!'], 2).save(folder / 'other')
    config = presets.tiny()
    import jax

    weights = params.init(config, jax.random.key(0))
    bundle.save(folder / 'm1', config, weights, ByteTokenizer(), 256)
    return folder


@pytest.fixture
def file(tmp_path):
    (tmp_path / 'text').write_bytes(TEXT)
    return tmp_path / 'text'


def call(*arguments):
    return run.main([*map(str, arguments), '--out', str(arguments[1]) + '.run'])


@pytest.mark.parametrize(
    ('model', 'size'), [('ngram', 0), ('ngram', 1), ('ngram', len(TEXT)), ('m1', 150)]
)
def test_a_file_comes_back_as_it_was(models, file, model, size):
    file.write_bytes(TEXT[:size])
    assert call('compress', file, '--model', models / model) == 0
    back = file.with_name('back')
    assert call('decompress', f'{file}.tess', '--model', models / model, '--to', back) == 0
    assert back.read_bytes() == TEXT[:size]
    if size == len(TEXT):
        assert file.with_name('text.tess').stat().st_size < size / 3


def refused(capsys, *arguments):
    assert call(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1 and 'Traceback' not in error
    return error


def test_what_cannot_be_restored_is_refused_and_leaves_nothing(models, file, capsys):
    assert call('compress', file, '--model', models / 'ngram') == 0
    packed = file.with_name('text.tess')
    whole = packed.read_bytes()
    file.unlink()

    def decompress(data, model='ngram'):
        packed.write_bytes(data)
        return refused(capsys, 'decompress', packed, '--model', models / model)

    assert 'made with the model' in decompress(whole, 'other')
    assert str(packed) in decompress(b'PK\x03\x04' + whole)
    assert 'truncated' in decompress(whole[:-3])
    for at in range(0, len(whole), 29):
        decompress(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    assert not file.exists() and not list(file.parent.glob('*.partial'))


def test_nothing_is_overwritten(models, file, capsys):
    assert call('compress', file, '--model', models / 'ngram') == 0
    assert 'exists' in refused(capsys, 'compress', file, '--model', models / 'ngram')
    assert 'exists' in refused(capsys, 'decompress', f'{file}.tess', '--model', models / 'ngram')
    assert file.read_bytes() == TEXT


def test_missing_and_foreign_inputs_are_named(models, file, tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    for model in ('nowhere', 'empty'):
        assert model in refused(capsys, 'compress', file, '--model', tmp_path / model)
    assert 'folder' in refused(capsys, 'compress', tmp_path / 'empty', '--model', models / 'ngram')
    missing = tmp_path / 'missing'
    assert str(missing) in refused(capsys, 'compress', missing, '--model', models / 'ngram')
    assert '.tess' in refused(capsys, 'decompress', file, '--model', models / 'ngram')


def test_what_decompress_cannot_find_is_named_and_not_blamed_on_the_disk(
    models, file, tmp_path, capsys
):
    assert call('compress', file, '--model', models / 'ngram') == 0
    packed = file.with_name('text.tess')
    to = ('--to', tmp_path / 'back')
    for source, model in ((packed, tmp_path / 'nowhere'), (tmp_path / 'gone', models / 'ngram')):
        error = refused(capsys, 'decompress', source, '--model', model, *to)
        assert str(model if source == packed else source) in error
        assert 'could not be written' not in error
    assert not (tmp_path / 'back').exists()


def test_a_full_disk_leaves_nothing(models, file, capsys, monkeypatch):
    from tokenization.coding import container

    def full(reader, writer, model, progress):
        writer.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(container, 'compress', full)
    assert 'No space left' in refused(capsys, 'compress', file, '--model', models / 'ngram')
    assert sorted(p.name for p in file.parent.iterdir() if p.is_file()) == ['text']


def test_usage_errors_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(['compress'])
    assert stop.value.code == 2
