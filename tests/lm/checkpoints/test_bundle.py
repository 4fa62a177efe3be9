"""Bundles load as they were saved, and damaged ones say what is wrong."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from lm.checkpoints import bundle
from lm.model import params, presets
from tests.lm.checkpoints import make_bundle
from tokenization.vocabularies.byte import ByteTokenizer

OLD = pathlib.Path(__file__).parent / 'old_bundle'
OLD_DIGEST = 'bea926b434f2df79f0cdd4928a579483cec8c17f4fe3ac1d817e940e5ab6a3a5'
OLD_WEIGHTS = [0.28289473056793213, 0.05839574709534645]
CONFIG = presets.tiny(40)
# of CONFIG with all weights 0, as the version before that field printed it
BEFORE_LEXINVARIANT = '110c6fe6bd1e6505fe8a8a804a6c9da33fae262c78b8aefe706f6698f9ab4133'


class FakeTokenizer:
    def save(self, path):
        path.mkdir(parents=True)
        (path / 'tessera.json').write_text('{"kind": "byte"}')


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp('bundles') / 'model'
    weights = params.init(CONFIG, jax.random.key(3))
    bundle.save(path, CONFIG, weights, FakeTokenizer(), 39, {'bits_per_byte': 1.5})
    return path, weights


def copy(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / 'copy')
    return tmp_path / 'copy'


def edit(path, change):
    fields = json.loads((path / 'config.json').read_text())
    change(fields)
    (path / 'config.json').write_text(json.dumps(fields))


def test_a_bundle_loads_as_it_was_saved(saved):
    loaded = bundle.load(saved[0])
    assert loaded.config == CONFIG
    assert loaded.metrics == {'bits_per_byte': 1.5} and loaded.bos == 39
    assert (loaded.tokenizer_path / 'tessera.json').exists()
    jax.tree.map(np.testing.assert_array_equal, loaded.params, saved[1])
    assert bundle.digest(CONFIG, loaded.params) == bundle.digest(CONFIG, saved[1])


def test_the_digest_sees_one_changed_weight(saved):
    changed = jax.tree.map(lambda x: x, saved[1])
    changed['body']['final_norm_D'] = changed['body']['final_norm_D'].at[3].set(2.0)
    assert bundle.digest(CONFIG, changed) != bundle.digest(CONFIG, saved[1])


def test_digests_of_models_from_before_a_field_was_added_stand():
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params.abstract(CONFIG))
    assert bundle.digest(CONFIG, zeros) == BEFORE_LEXINVARIANT


def test_a_bundle_from_before_architectures_loads():
    loaded = bundle.load(OLD)
    assert loaded.config == make_bundle.CONFIG and loaded.bos == 256
    assert loaded.metrics == make_bundle.METRICS and loaded.architecture.name == 'transformer'
    assert bundle.digest(loaded.config, loaded.params) == OLD_DIGEST
    wq_NDHC = loaded.params['body']['layers']['wq_NDHC']
    assert wq_NDHC.shape == (1, 4, 2, 2) and wq_NDHC[0, 3, 1].tolist() == OLD_WEIGHTS
    _, tables = bundle.load_part(OLD, 'tables')
    np.testing.assert_array_equal(tables['input_VD'], loaded.params['tables']['input_VD'])


def test_an_old_bundle_is_written_again_as_it_was(tmp_path):
    loaded = bundle.load(OLD)
    bundle.save(
        tmp_path / 'x', loaded.config, loaded.params, ByteTokenizer(), loaded.bos, loaded.metrics
    )
    lines = [(path / 'config.json').read_text().split('\n') for path in (OLD, tmp_path / 'x')]
    old, new = ([x for x in some if '"commit"' not in x] for some in lines)
    assert old == new and len(new) == len(lines[1]) - 1


def test_a_missing_folder_and_a_foreign_one(tmp_path):
    with pytest.raises(FileNotFoundError, match='no bundle here'):
        bundle.load(tmp_path / 'nothing')
    (tmp_path / 'config.json').write_text('[1]')
    with pytest.raises(ValueError, match='not the config of a bundle'):
        bundle.load(tmp_path)


def test_leaves_missing_left_over_and_misshapen_are_all_named(saved, tmp_path):
    path = copy(saved, tmp_path)
    edit(path, lambda fields: fields['model'].update(qkv_bias=True, tied=True, d_ff=100))
    with pytest.raises(ValueError) as error:
        bundle.load(path)
    message = str(error.value)
    assert 'body/layers/bq_NHC is missing' in message
    assert 'tables/output_VD is not part of this model' in message
    assert 'body/layers/w_up_NDF is float32[2, 64, 128], expected float32[2, 64, 100]' in message


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda f: f.update(format=9), 'format 9'),
        (lambda f: f['model'].update(n_heads=3), 'n_heads'),
        (lambda f: f['model'].update(colour='red'), 'colour'),
        (lambda f: f['model'].pop('d_model'), 'd_model'),
        (lambda f: f['model'].update(d_model='16'), "d_model: '16'; expected int"),
        (lambda f: f['model'].update(rope_theta=None), 'rope_theta: None'),
        (lambda f: f['model'].update(rope_theta=-1), 'rope_theta'),
        (lambda f: f['model'].update(window_pattern='ab'), 'window_pattern'),
        (lambda f: f.update(bos='x'), "bos: 'x'; expected null or an id"),
        (lambda f: f.update(bos=10**6), 'bos: 1000000'),
        (lambda f: f.pop('model'), 'not the config of a bundle'),
    ],
)
def test_a_bad_config_names_the_field(saved, tmp_path, change, message):
    path = copy(saved, tmp_path)
    edit(path, change)
    with pytest.raises(ValueError, match=message):
        bundle.load(path)


def test_missing_params_are_named(saved, tmp_path):
    path = copy(saved, tmp_path)
    shutil.rmtree(path / 'params')
    with pytest.raises(ValueError, match='params/ is missing'):
        bundle.load(path)


def test_a_flipped_bit_is_noticed(saved, tmp_path):
    path = copy(saved, tmp_path)
    largest = max((f for f in path.rglob('d/*') if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(ValueError, match='copy'):
        bundle.load(path)


def test_a_bundle_killed_while_it_was_replaced_still_loads(saved, tmp_path):
    path = copy(saved, tmp_path)
    path.rename(tmp_path / 'copy.old')
    assert bundle.load(path).metrics == {'bits_per_byte': 1.5}


def test_a_full_disk_leaves_the_older_bundle(saved, tmp_path):
    path = copy(saved, tmp_path)

    class Full(FakeTokenizer):
        def save(self, path):
            super().save(path)
            raise OSError(28, 'No space left on device')

    with pytest.raises(OSError, match='No space left'):
        bundle.save(path, CONFIG, saved[1], Full(), 39)
    assert [p.name for p in tmp_path.iterdir()] == ['copy']
    assert bundle.load(path).metrics == {'bits_per_byte': 1.5}


def test_another_folder_is_never_overwritten(saved, tmp_path):
    (tmp_path / 'thesis').mkdir()
    with pytest.raises(FileExistsError, match='is not a bundle'):
        bundle.save(tmp_path / 'thesis', CONFIG, saved[1], FakeTokenizer(), 40)
