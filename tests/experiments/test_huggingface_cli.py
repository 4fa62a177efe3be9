"""The commands import_hf and export_hf."""

import dataclasses
import json
import shutil

import jax
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from decoding import model
from experiments import decoding_models, run
from lm.checkpoints import bundle
from lm.devices import mesh
from lm.huggingface import checkpoint as huggingface
from lm.model import params, presets
from lm.model.config import Config, RopeScaling
from tokenization.huggingface.tokenizer import HuggingFaceTokenizer
from tokenization.vocabularies.byte import ByteTokenizer

CONFIG = Config(
    272, 16, 2, 2, 1, 8, 32, max_length=256, tied=True, rope_theta=5e5,
    rope_scaling=RopeScaling('llama3', 8.0), dtype='bfloat16', param_dtype='bfloat16',
)  # fmt: skip


def write_tokenizer(folder):
    """Writes a byte-level vocabulary with BOS and EOS, in the format of transformers."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(['<|begin|>', '<|end|>'])
    made.save(str(folder / 'tokenizer.json'))
    names = {'bos_token': '<|begin|>', 'eos_token': '<|end|>'}
    (folder / 'tokenizer_config.json').write_text(json.dumps(names))


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp('checkpoints') / 'llama'
    huggingface.save(folder, CONFIG, params.init(CONFIG, jax.random.key(0)))
    write_tokenizer(folder)
    return folder


def weights(folder):
    files = sorted(folder.glob('*.safetensors'))
    return {k: v.tobytes() for f in files for k, v in safetensors.numpy.load_file(f).items()}


def refused(capsys, *arguments):
    assert run.main([*map(str, arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1 and 'Traceback' not in error
    return error


def test_a_checkpoint_is_imported_continued_and_exported_as_it_was(checkpoint, tmp_path, capsys):
    out, back = tmp_path / 'bundle', tmp_path / 'back'
    assert run.main(['import_hf', str(checkpoint), '--out', str(out)]) == 0
    printed = ' '.join(capsys.readouterr().out.split())
    assert 'llama, 9,040 parameters in bfloat16, 258 tokens' in printed
    assert sorted(path.name for path in out.iterdir()) == ['config.json', 'params', 'tokenizer']
    loaded = bundle.load(out, mesh.make(devices=jax.devices()[:1]))
    assert loaded.config == CONFIG and loaded.bos == 256

    words = ['generate', '--bundle', str(out), '--prompt', 'To be', '--max_tokens', '4']
    assert run.main([*words, '--out', str(tmp_path / 'text')]) == 0
    assert 'To be' in capsys.readouterr().out

    assert run.main(['export_hf', str(out), '--out', str(back), '--shard_gb', '5e-6']) == 0
    assert len(list(back.glob('*.safetensors'))) > 1
    assert weights(back) == weights(checkpoint)
    assert (back / 'tokenizer.json').read_text() == (checkpoint / 'tokenizer.json').read_text()
    assert json.loads((back / 'tokenizer_config.json').read_text())['eos_token'] == '<|end|>'
    described = json.loads((back / 'config.json').read_text())
    assert (described['bos_token_id'], described['eos_token_id']) == (256, 257)
    assert run.main(['import_hf', str(back), '--out', str(out)]) == 0  # an older bundle is replaced


def test_a_model_with_our_own_tokenizer_is_exported_alone(tmp_path, capsys):
    config = presets.tiny()
    one_device = mesh.make(devices=jax.devices()[:1])
    model = params.init(config, jax.random.key(0))
    bundle.save(tmp_path / 'bundle', config, model, ByteTokenizer(), 256)
    call = ['export_hf', str(tmp_path / 'bundle'), '--out', str(tmp_path / 'x')]
    assert run.main([*call, '--family', 'qwen3']) == 1
    assert 'qwen3 models cannot represent qk_norm' in capsys.readouterr().err
    assert run.main(call) == 0
    assert 'llama' in capsys.readouterr().out
    jax.tree.map(
        lambda a, b: bytes(a) == bytes(b) or pytest.fail('another weight'),
        huggingface.load(tmp_path / 'x', one_device)[1], model,
    )  # fmt: skip


def test_what_is_wrong_is_one_line_and_destroys_nothing(checkpoint, tmp_path, capsys):
    nothing = tmp_path / 'nothing'
    assert str(nothing) in refused(capsys, 'import_hf', nothing, '--out', tmp_path / 'b')
    assert str(nothing) in refused(capsys, 'export_hf', nothing, '--out', tmp_path / 'b')
    # the checkpoint itself as the output folder
    before = weights(checkpoint)
    assert 'is not a bundle' in refused(capsys, 'import_hf', checkpoint, '--out', checkpoint)
    assert weights(checkpoint) == before
    copy = shutil.copytree(checkpoint, tmp_path / 'copy')
    (copy / 'tokenizer.json').unlink()
    assert 'tokenizer' in refused(capsys, 'import_hf', copy, '--out', tmp_path / 'b')
    (copy / 'config.json').write_text('{"model_type": "bert"}')
    assert "'bert'" in refused(capsys, 'import_hf', copy, '--out', tmp_path / 'b')
    assert not (tmp_path / 'b').exists()


def test_a_tokenizer_with_more_ids_than_rows_is_refused(checkpoint, tmp_path, capsys):
    folder = tmp_path / 'small'
    config = Config(257, 16, 1, 2, 1, 8, 32)
    huggingface.save(folder, config, params.init(config, jax.random.key(0)))
    write_tokenizer(folder)
    error = refused(capsys, 'import_hf', folder, '--out', tmp_path / 'b')
    assert '258 ids' in error and '257 rows' in error


def test_special_tokens_without_a_row_are_left_out(checkpoint, tmp_path, capsys):
    folder = tmp_path / 'gemma'  # its tokenizer has an image token beyond the last row
    shutil.copytree(checkpoint, folder)
    made = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
    made.add_special_tokens([f'<unused{i}>' for i in range(14)] + ['<image>'])
    made.save(str(folder / 'tokenizer.json'))
    out, back = tmp_path / 'bundle', tmp_path / 'back'
    assert run.main(['import_hf', str(folder), '--out', str(out)]) == 0
    assert 'note: <image> left out: the model has no row for it' in capsys.readouterr().out
    loaded = decoding_models.load(out, mesh.make(devices=jax.devices()[:1]))
    assert loaded.tokenizer.vocab_size == 272 and loaded.model.bos == 256
    assert run.main(['export_hf', str(out), '--out', str(back)]) == 0
    assert tokenizers.Tokenizer.from_file(str(back / 'tokenizer.json')).get_vocab_size() == 272
    with_byte = json.loads((folder / 'tokenizer.json').read_text())
    with_byte['added_tokens'][-1]['special'] = False
    (folder / 'tokenizer.json').write_text(json.dumps(with_byte))
    assert '273 ids' in refused(capsys, 'import_hf', folder, '--out', tmp_path / 'b')


def test_a_text_begins_as_its_original_tokenizer_begins_it():
    vocabulary = {f'<0x{i:02X}>': i for i in range(256)} | {'<s>': 256, '</s>': 257, '▁': 258}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    steps = [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
    made.normalizer = normalizers.Sequence(steps)
    made.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback()])
    made.add_special_tokens(['<s>', '</s>'])
    names = {'bos': '<s>', 'eos': '</s>'}
    tokenizer = HuggingFaceTokenizer.from_json(made.to_str(), names)
    config = dataclasses.replace(CONFIG, vocab_size=259)
    loaded = decoding_models.Loaded(model.transformer(config, {}, '', 256), config, tokenizer)
    assert loaded.encode(b'a') == [256, *made.encode('a', add_special_tokens=False).ids]
    assert loaded.encode(b'a') == [256, 258, ord('a')]
    assert loaded.ends() == (257,) and loaded.token_bytes()[256:] == [b'', b'', b' ']


@pytest.mark.parametrize('name', ['import_hf', 'export_hf'])
def test_usage_errors_exit_with_2(name):
    with pytest.raises(SystemExit) as stop:
        run.main([name])
    assert stop.value.code == 2
