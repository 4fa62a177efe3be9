"""Damaged, unsupported or hostile checkpoints: one error lists every problem."""

import json
import pathlib
import random
import shutil
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy

from lm.huggingface import checkpoint as huggingface

FIXTURES = pathlib.Path(__file__).parent
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'


@pytest.fixture
def copy(tmp_path):
    def make(name):
        return pathlib.Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return make


def edit(file, change):
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


def refused(folder, kind=ValueError):
    with pytest.raises(kind) as error:
        huggingface.check(folder)
    message = str(error.value)
    assert str(folder) in message and '\n' not in message
    return message


def set_header(file, change):
    """Rewrites a file with its header changed."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, 'little') + text + data[8 + length :])


def test_missing_files_are_named(tmp_path, copy):
    assert 'config.json' in refused(tmp_path / 'nothing', FileNotFoundError)
    folder = copy('llama2')
    (folder / SINGLE).rename(folder / 'pytorch_model.bin')
    assert 'is a pickle' in refused(folder, FileNotFoundError)
    (folder / 'config.json').unlink()
    assert 'config.json' in refused(folder, FileNotFoundError)


@pytest.mark.parametrize(
    ('name', 'fields', 'named'),
    [
        ('llama2', {'model_type': 'gpt_neox'}, "model_type: 'gpt_neox'; expected one of llama"),
        ('llama2', {'model_type': ['llama']}, 'model_type'),
        ('llama2', {'attention_bias': True}, 'attention_bias: True; not supported'),
        ('llama2', {'mlp_bias': True}, 'mlp_bias: True; not supported'),
        ('llama2', {'hidden_act': 'swoosh'}, "hidden_act: 'swoosh'; expected silu or gelu"),
        ('llama2', {'quantization_config': {'bits': 4}}, 'quantization_config'),
        ('llama2', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor'),
        ('llama2', {'num_local_experts': 8}, 'num_local_experts: 8; not supported'),
        ('llama2', {'auto_map': {'AutoModelForCausalLM': 'x.Y'}}, 'custom code'),
        ('llama2', {'rope_scaling': {'type': 'yarn', 'factor': 4}}, "RoPE scaling: 'yarn'"),
        ('llama2', {'rope_scaling': {'rope_type': 'dynamic', 'factor': 4}}, "'dynamic'"),
        ('llama2', {'rope_scaling': {'rope_type': 'longrope'}}, "'longrope'"),
        ('llama2', {'rope_scaling': {'rope_type': 'linear'}}, 'factor: None; expected a number, 1'),
        ('llama2', {'rope_scaling': {'rope_type': 'linear', 'factor': 0.5}}, 'factor: 0.5'),
        ('llama2', {'rope_scaling': {'mrope_section': [1, 2]}}, 'mrope_section'),
        ('llama2', {'rope_scaling': 'linear'}, 'rope_scaling'),
        ('llama3', {'rope_scaling': {'factor': 2}}, 'null beside rope_parameters'),
        ('llama3', {'rope_parameters': {'rope_type': 'llama3', 'factor': 8}}, 'low_freq_factor'),
        ('llama2', {'layer_types': ['full_attention'] * 3}, 'layer_types'),
        ('llama2', {'hidden_size': None}, 'hidden_size: None; expected a whole number'),
        ('llama2', {'num_hidden_layers': 10**400}, 'num_hidden_layers'),
        ('llama2', {'num_hidden_layers': 2_000_000_000}, '10,000 at most'),
        ('llama2', {'num_hidden_layers': 9_000}, '9000 layers, but only 30 tensors'),
        ('llama2', {'num_attention_heads': True}, 'num_attention_heads: True'),
        ('llama2', {'num_key_value_heads': 3}, 'multiple of n_kv_heads = 3'),
        ('llama2', {'rms_norm_eps': '1e-6'}, "rms_norm_eps: '1e-6'; expected a positive number"),
        ('llama2', {'tie_word_embeddings': 'no'}, 'tie_word_embeddings'),
        ('gemma2', {'sliding_window': None}, 'sliding_window: None'),
        ('gemma2', {'layer_types': ['full_attention']}, 'layer_types'),
        ('gemma3', {'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping: 50.0'),
        ('gemma3', {'use_bidirectional_attention': True}, 'use_bidirectional_attention'),
        ('gemma3', {'rope_parameters': {'rope_type': 'default'}}, 'full_attention and sliding'),
        ('gemma3', {'rope_parameters': {'sliding_attention': {'rope_type': 'linear', 'factor': 2}}},
         'no scaling of sliding_attention'),
        ('gemma3_multimodal', {'text_config': None}, 'text_config'),
        ('gemma3_multimodal', {'text_config': {'model_type': 'llama'}}, 'text_config'),
    ],
)  # fmt: skip
def test_unsupported_fields_of_config_json_are_named(copy, name, fields, named):
    folder = copy(name)
    edit(folder / 'config.json', lambda config: config.update(fields))
    message = refused(folder)
    assert 'config.json: ' in message or ' layers, but only ' in message
    assert named in message


def test_one_error_lists_every_problem(copy):
    folder = copy('llama2')
    edit(folder / 'config.json', lambda c: c.update(mlp_bias=True, hidden_act='x', vocab_size=-1))
    (folder / SINGLE).write_bytes(b'\x03')
    message = refused(folder)
    for part in ('mlp_bias', 'hidden_act', 'vocab_size', 'model.safetensors: damaged or truncated'):
        assert part in message


def test_missing_unexpected_and_misshapen_tensors_and_wrong_dtypes_are_all_named(copy):
    folder = copy('qwen3')
    tensors = safetensors.numpy.load_file(folder / SINGLE)
    for i in range(3):
        del tensors[f'model.layers.{i}.mlp.up_proj.weight']
    tensors['model.layers.0.self_attn.q_proj.bias'] = np.zeros(3, np.float32)
    tensors['model.layers.1.self_attn.o_proj.weight'] = np.zeros((24, 16), np.float32)
    tensors['model.norm.weight'] = np.zeros(16, np.int8)
    del tensors['lm_head.weight']
    safetensors.numpy.save_file(tensors, folder / SINGLE)
    message = refused(folder)
    assert 'missing: lm_head.weight, model.layers.0-2.mlp.up_proj.weight;' in message
    assert 'not part of this model: model.layers.0.self_attn.q_proj.bias;' in message
    assert 'model.layers.1.self_attn.o_proj.weight: shape [24, 16], expected [16, 24]' in message
    assert 'model.norm.weight: dtype I8, expected one of F32, F16, BF16' in message


def test_a_tied_table_may_be_stored_twice_if_both_copies_are_equal(copy):
    folder = copy('gemma2')
    tensors = safetensors.numpy.load_file(folder / SINGLE)
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
    safetensors.numpy.save_file(tensors, folder / SINGLE)
    assert huggingface.check(folder).config.tied
    tensors['lm_head.weight'][-1, -1] += 1
    safetensors.numpy.save_file(tensors, folder / SINGLE)
    assert 'differs from the input table' in refused(folder)


def test_rotary_frequencies_in_old_checkpoints_are_ignored(copy):
    folder = copy('llama2')
    tensors = safetensors.numpy.load_file(folder / SINGLE)
    tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.zeros(2, np.float32)
    safetensors.numpy.save_file(tensors, folder / SINGLE)
    huggingface.check(folder)


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        (lambda h: h['model.norm.weight'].update(data_offsets=[0, 64]), 'begins at byte'),
        (lambda h: h['model.norm.weight'].update(data_offsets=[64, 0]), 'two offsets in order'),
        (lambda h: h['model.norm.weight'].update(data_offsets=[-8, 56]), 'lists of sizes'),
        (lambda h: h['model.norm.weight'].update(shape=[17]), '64 bytes for F32[17]'),
        (lambda h: h['model.norm.weight'].update(shape=[2**62, 2**62]), 'bytes for F32'),
        (lambda h: h['model.norm.weight'].update(shape=[1] * 100), 'lists of sizes'),
        (lambda h: h['model.norm.weight'].update(shape=[16.0]), 'lists of sizes'),
        (lambda h: h['model.norm.weight'].pop('dtype'), 'expected dtype, shape and data_offsets'),
        (lambda h: h.pop('model.norm.weight'), 'the header lists'),
        (lambda h: h.update(extra=7), 'expected dtype, shape and data_offsets'),
    ],
)
def test_damaged_headers(copy, change, named):
    folder = copy('llama2')
    set_header(folder / SINGLE, change)
    message = refused(folder)
    assert named in message and SINGLE in message


@pytest.mark.parametrize(
    ('cut', 'named'),
    [
        (lambda data: b'', 'truncated'),
        (lambda data: data[:100], 'truncated'),
        (lambda data: data[:-1], 'truncated: 3'),
        (lambda data: data + b'\0', 'the header lists'),
        (lambda data: b'\xff' * 8 + data[8:], 'truncated'),
        (lambda data: (7).to_bytes(8, 'little') + b'[' * 7 + data[15:], 'header: damaged'),
        (lambda data: (90_000).to_bytes(8, 'little') + b'[' * 90_000, 'header: damaged'),
        (lambda data: (2).to_bytes(8, 'little') + b'[]', 'expected a JSON object'),
        (lambda data: (4).to_bytes(8, 'little') + b'\xff\xfe\xfd\xfc', 'header: damaged'),
        (lambda data: (17).to_bytes(8, 'little') + b'{"a": 1, "a": 2 }', 'duplicate key'),
        (lambda data: (8).to_bytes(8, 'little') + b'{"a":NaN', 'NaN is not valid JSON'),
    ],
)
def test_invalid_safetensors_files(copy, cut, named):
    folder = copy('llama2')
    (folder / SINGLE).write_bytes(cut((folder / SINGLE).read_bytes()))
    assert named in refused(folder)


def test_an_index_that_lists_files_that_do_not_exist(copy):
    folder = copy('mistral')
    names = ('../x.safetensors', '/etc/passwd', 'a/b', '..', 'gone.safetensors', 'C:\\x', '')

    def change(index):
        for tensor, name in zip(list(index['weight_map']), names):
            index['weight_map'][tensor] = name
        index['weight_map']['invented'] = 'model-00001-of-00003.safetensors'

    edit(folder / INDEX, change)
    message = refused(folder)
    for name in names:
        listed = f'{name!r} is not the name of a file' if name != 'gone.safetensors' else name
        assert listed in message
    assert 'gone.safetensors: no such file' in message
    assert 'lacks tensors that the index lists: invented' in message
    for weight_map in (None, {}, [], {'a': 1}, {'a': None}):
        edit(folder / INDEX, lambda index, m=weight_map: index.update(weight_map=m))
        assert 'weight_map' in refused(folder)


def test_a_file_that_shrinks_while_being_read(copy, monkeypatch):
    folder = copy('llama2')
    found = huggingface.check(folder)
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[: len(data) // 2])
    monkeypatch.setattr(huggingface, 'check', lambda *_: found)
    with pytest.raises(ValueError, match='ends too soon'):
        huggingface.load(folder)


def _mutated(data, draw):
    """Returns bytes with a few spans overwritten, removed, repeated, or made a large number."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        length = draw.choice([0, 1, 2, 8, 40])
        new = draw.choice([b'', draw.randbytes(length), data[at : at + length] * 2, b'9' * length,
                           b'-1', b'null', b'[]', b'{}', b'"', b'1e999', b'true'])  # fmt: skip
        data[at : at + length] = new
    return bytes(data)


@pytest.mark.parametrize(
    ('name', 'file'),
    [('mistral', INDEX), ('mistral', 'config.json'), ('llama3', 'config.json'),
     ('gemma3', 'config.json'), ('gemma3_multimodal', 'config.json'), ('qwen2', 'config.json'),
     ('llama2', SINGLE), ('mistral', 'model-00002-of-00003.safetensors')],
)  # fmt: skip
def test_mutated_files_are_read_or_refused(copy, name, file):
    draw = random.Random(name + file)
    folder = copy(name)
    whole = (folder / file).read_bytes()
    # in a file of tensors, mutate the header only
    head, tail = whole, b''
    if file.endswith('.safetensors'):
        end = 8 + int.from_bytes(whole[:8], 'little')
        head, tail = whole[:end], whole[end:]
    refusals = 0
    tracemalloc.start()
    for _ in range(150):
        (folder / file).write_bytes(_mutated(head, draw) + tail)
        try:
            huggingface.check(folder)
        except (ValueError, FileNotFoundError) as error:
            assert '\n' not in str(error)
            refusals += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refusals > 50
    assert peak < 20e6, f'{peak:,} bytes'


@pytest.mark.parametrize('name', ['llama3', 'mistral', 'qwen2', 'gemma2', 'gemma3'])
def test_any_value_of_any_field_is_read_or_refused(copy, name):
    draw = random.Random(name)
    folder = copy(name)
    config = json.loads((folder / 'config.json').read_text())
    values = [
        None, True, False, 0, 1, -1, 7, 2**31, 2**70, 10**350, 0.5, -0.0, 1e300, 1e-320, '', 'x',
        [], [1], {}, {'rope_type': 'linear'}, ['full_attention'], [['x']], {'a': {}},
    ]  # fmt: skip
    for _ in range(300):
        changed = json.loads(json.dumps(config))
        for _ in range(draw.randint(1, 2)):
            part = changed
            field = draw.choice([*part, 'use_sliding_window', 'rope_scaling', 'layer_types'])
            while isinstance(part.get(field), dict) and part[field] and draw.random() < 0.8:
                part = part[field]
                field = draw.choice(list(part))
            part[field] = draw.choice(values)
        (folder / 'config.json').write_text(json.dumps(changed))
        try:
            huggingface.check(folder)
        except ValueError as error:
            assert '\n' not in str(error)
