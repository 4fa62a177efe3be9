"""Checkpoints: logits of transformers, bit-exact exports, and tensors sharded over devices."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lm.devices import mesh
from lm.huggingface import checkpoint as huggingface
from lm.huggingface import safetensors_files, weight_map
from lm.huggingface.families import FAMILIES
from lm.model import config as config_lib
from lm.model import params, presets, stepped
from lm.model import transformer as transformer_lib
from tests.lm.model import steps

FIXTURES = pathlib.Path(__file__).parent
NAMES = sorted(file.parent.name for file in FIXTURES.glob('*/expected.npz'))
TOLERANCE = 1e-4


@functools.cache
def loaded(name):
    return huggingface.load(FIXTURES / name, one_device())


def one_device():
    return mesh.make(devices=jax.devices()[:1])


def expected(name):
    """Tokens, a mask of real tokens, and the logits of transformers."""
    with np.load(FIXTURES / name / 'expected.npz') as file:
        return file['tokens'], file['real'], file['logits']


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('name', NAMES)
def test_logits_equal_those_of_transformers_with_padding_on_either_side(name):
    config, weights = loaded(name)
    tokens, real, logits = expected(name)
    assert real[0].all() and not real[1, 0] and not real[2, -1]
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    got = jax.jit(transformer_lib.forward, static_argnums=1)(
        weights, config, tokens, positions, real.astype(np.int32)
    )
    np.testing.assert_allclose(np.where(real[..., None], got, 0), logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize('name', NAMES)
def test_logits_equal_those_of_transformers_token_by_token(name):
    config, weights = loaded(name)
    tokens, real, logits = expected(name)

    @jax.jit
    def read(memory, tokens_B, real_B):
        logits_BLV, memory = steps.step(weights, config, memory, tokens_B[:, None])
        # drop padding again, so that rows differ in length
        return logits_BLV[:, 0], stepped.model(config).keep(memory, None, real_B)

    memory = steps.empty(config, len(tokens), tokens.shape[1])
    for i in range(tokens.shape[1]):
        got, memory = read(memory, tokens[:, i], real[:, i].astype(np.int32))
        want = logits[:, i]
        np.testing.assert_allclose(
            np.where(real[:, i, None], got, 0), want, atol=TOLERANCE, rtol=0, err_msg=f'token {i}'
        )


@pytest.mark.parametrize('name', NAMES)
def test_an_export_reads_back_bit_identical(name, tmp_path):
    config, weights = loaded(name)
    family = json.loads((FIXTURES / name / 'config.json').read_text())['model_type']
    most = 12_000 if name in ('llama3', 'gemma3') else huggingface.MOST_SHARD_BYTES
    kind = huggingface.save(tmp_path / 'export', config, weights, most_shard_bytes=most)
    assert kind == {'gemma3': 'gemma3_text'}.get(family, family)
    again, back = huggingface.load(tmp_path / 'export', one_device())
    assert again == config
    assert_equal(back, weights)
    files = sorted((tmp_path / 'export').glob('*.safetensors'))
    assert (len(files) > 2) == (most == 12_000)
    # and the format's own library reads the same tensors
    theirs = {k: v for file in files for k, v in safetensors.numpy.load_file(file).items()}
    if family != 'gemma3':
        ours = {
            k: v
            for file in sorted((FIXTURES / name).glob('*.safetensors'))
            for k, v in safetensors.numpy.load_file(file).items()
        }
        assert theirs.keys() == ours.keys()
        assert_equal(theirs, ours)


def test_tensors_are_sharded_as_their_leaves():
    config, whole = loaded('llama3')
    of_eight = mesh.make('data=2,model=4', jax.devices('cpu'))
    _, spread = huggingface.load(FIXTURES / 'llama3', of_eight)
    wanted = params.shardings(config, of_eight)
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(), spread, wanted
    )
    assert_equal(jax.device_get(spread), jax.device_get(whole))
    assert spread['body']['layers']['w_up_NDF'].addressable_shards[0].data.shape == (3, 8, 6)


def copy_as(tmp_path, dtypes, name='mistral'):
    """Copies a fixture, casting its tensors to the dtypes in turn."""
    folder = tmp_path / 'cast'
    shutil.copytree(FIXTURES / name, folder)
    for file in folder.glob('*.safetensors'):
        tensors = safetensors.numpy.load_file(file)
        cast = {k: x.astype(dtypes[i % len(dtypes)]) for i, (k, x) in enumerate(tensors.items())}
        safetensors.numpy.save_file(cast, file)
    return folder


@pytest.mark.parametrize(
    ('dtypes', 'asked', 'result'),
    [
        ([jnp.bfloat16], None, 'bfloat16'),
        ([jnp.bfloat16], 'float32', 'float32'),
        ([np.float16], None, 'float32'),
        ([np.float32], 'bfloat16', 'bfloat16'),
        ([jnp.bfloat16, np.float16], None, 'float32'),
    ],
)
def test_the_dtype_is_as_requested_or_represents_all_tensors_exactly(
    tmp_path, dtypes, asked, result
):
    folder = copy_as(tmp_path, dtypes)
    config, weights = huggingface.load(folder, one_device(), asked)
    assert config.param_dtype == config.dtype == result
    tensors = {k: v for f in folder.glob('*.safetensors')
               for k, v in safetensors.numpy.load_file(f).items()}  # fmt: skip
    up_DF = weights['body']['layers']['w_up_NDF'][1]
    want = tensors['model.layers.1.mlp.up_proj.weight'].T.astype(result)
    np.testing.assert_array_equal(np.asarray(up_DF), want)
    huggingface.save(tmp_path / 'export', config, weights)
    assert_equal(huggingface.load(tmp_path / 'export', one_device())[1], weights)


@pytest.mark.parametrize('family', FAMILIES, ids=lambda family: family.model_type)
def test_a_family_maps_tensors_to_every_leaf_once(family):
    config = presets.tiny()
    config = dataclasses.replace(config, **family.same)
    slices = weight_map.leaf_slices(config, family)
    leaves = weight_map.by_name(params.abstract(config))
    filled = [(part.leaf, part.layer) for part in slices.values()]
    assert len(set(filled)) == len(filled)
    assert {leaf for leaf, _ in filled} == set(leaves)
    for leaf, x in leaves.items():
        parts = [part for part in slices.values() if part.leaf == leaf]
        assert sum(np.prod(part.shape) for part in parts) == x.size


@pytest.mark.parametrize(
    ('change', 'family', 'named'),
    [
        ({'qk_norm': True, 'qkv_bias': True}, None, 'qwen2 models cannot represent qk_norm'),
        ({'qk_norm': True}, 'llama', 'llama models cannot represent qk_norm'),
        ({'window': 8, 'window_pattern': (True, False)}, 'mistral', 'windows'),
        ({'attention_scale': 0.3}, 'gemma2', 'attention scale'),
        ({'d_model': 62}, 'llama', 'not a multiple of n_heads'),
        ({'tied': True, 'lexinvariant': config_lib.Lexinvariant(probability=0.5)}, None,
         'lexinvariant'),
        ({}, 'gpt2', "family: 'gpt2'; expected one of llama"),
    ],
)  # fmt: skip
def test_models_that_a_family_cannot_represent_are_not_exported(tmp_path, change, family, named):
    config = dataclasses.replace(presets.tiny(), **change)
    with pytest.raises(ValueError, match=named):
        huggingface.save(tmp_path / 'x', config, {}, family)
    assert not (tmp_path / 'x').exists()


def test_an_export_replaces_only_checkpoints_and_atomically(tmp_path, monkeypatch):
    config, weights = loaded('llama2')
    (tmp_path / 'bundle').mkdir()
    (tmp_path / 'bundle' / 'config.json').write_text('{"format": 1}')
    with pytest.raises(FileExistsError, match='is not a checkpoint'):
        huggingface.save(tmp_path / 'bundle', config, weights)
    huggingface.save(tmp_path / 'x', config, weights, files={'tokenizer.json': 'é'})
    assert (tmp_path / 'x' / 'tokenizer.json').read_text() == 'é'

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(safetensors_files, 'write_folder', full)
    with pytest.raises(OSError, match='No space left'):
        huggingface.save(tmp_path / 'x', config, weights)
    assert_equal(huggingface.load(tmp_path / 'x', one_device())[1], weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['bundle', 'x']


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_loading_needs_little_memory_beside_the_parameters():
    script = pathlib.Path(__file__).with_name('memory.py')
    environment = {**os.environ, 'PYTHONPATH': os.getcwd(), 'JAX_PLATFORMS': 'cpu'}
    run = subprocess.run(
        [sys.executable, script], env=environment, check=True, capture_output=True, text=True
    )
    assert json.loads(run.stdout)['ratio'] < 1.3, run.stdout
