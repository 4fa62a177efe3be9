"""A bundle of two bodies: an architecture that `lm` does not know is saved and loaded like its own.

The toy hierarchy reads bytes with a small body and pooled windows of them with a large one.
"""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from lm.checkpoints import architecture, bundle
from lm.checkpoints.architecture import KNOWN, Architecture
from lm.files import dataclass_json
from lm.model import params
from lm.model.config import Config
from lm.model.params import Leaf


@dataclasses.dataclass(frozen=True)
class Hierarchy:
    small: Config
    large: Config
    strides: tuple[int, ...] = (4,)

    def __post_init__(self):
        if min(self.strides, default=0) < 1:
            raise ValueError(f'Hierarchy.strides: {self.strides}; expected numbers of at least 1')


def leaves(config):
    small, large = params.leaves(config.small), params.leaves(config.large)
    d, e = config.small.d_model, config.large.d_model
    pool = {'w_pool_DE': Leaf((config.strides[0] * d, e), ('embed', 'ff'), d**-0.5)}
    return {'small': small['body'], 'large': large['body'], 'tables': small['tables'], 'pool': pool}


HIERARCHY = Architecture(
    'hierarchy',
    dataclasses.asdict,
    lambda fields: dataclass_json.read(Hierarchy, fields, 'hierarchy config'),
    leaves,
    vocab_size=lambda config: config.small.vocab_size,
)
ALL = {**KNOWN, HIERARCHY.name: HIERARCHY}
CONFIG = Hierarchy(Config(17, 8, 1, 2, 1, 4, 8, tied=True), Config(1, 16, 2, 2, 2, 8, 16))


class NoTokenizer:
    def save(self, path):
        path.mkdir(parents=True)


def weights(config=CONFIG):
    draw = np.random.default_rng(0)
    like = architecture.abstract(HIERARCHY, config)
    return jax.tree.map(lambda x: draw.standard_normal(x.shape).astype(x.dtype), like)


def save(path, tree, config=CONFIG, **more):
    arguments = {'bos': 16, 'metrics': {}, **more}
    bundle.save(path, config, tree, NoTokenizer(), **arguments, architecture=HIERARCHY)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp('bundles') / 'hierarchy'
    save(path, weights(), metrics={'bits_per_byte': 1.5})
    return path


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / 'copy')
    return tmp_path / 'copy'


def edit(path, change):
    fields = json.loads((path / 'config.json').read_text())
    change(fields)
    (path / 'config.json').write_text(json.dumps(fields))


def test_two_bodies_load_as_they_were_saved(saved):
    loaded = bundle.load(saved, architectures=ALL)
    assert loaded.config == CONFIG and loaded.architecture is HIERARCHY
    assert loaded.bos == 16 and loaded.metrics == {'bits_per_byte': 1.5}
    jax.tree.map(np.testing.assert_array_equal, loaded.params, weights())


@pytest.mark.parametrize('part', ['small', 'large', 'tables', 'pool'])
def test_each_part_loads_by_itself(saved, part):
    config, loaded = bundle.load_part(saved, part, architectures=ALL)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, loaded, weights()[part])


def test_a_part_that_the_architecture_lacks(saved):
    with pytest.raises(ValueError, match="no part 'body'; there are: large, pool, small, tables"):
        bundle.load_part(saved, 'body', architectures=ALL)


def test_an_unknown_name_lists_the_known_ones_and_how_to_pass_ones_own(saved):
    with pytest.raises(ValueError) as error:
        bundle.load(saved)
    message = str(error.value)
    assert f"{saved / 'config.json'}: architecture 'hierarchy'; expected transformer" in message
    assert 'architectures={**ARCHITECTURES, mine.name: mine}' in message


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda f: f.update(architecture=['hierarchy']), r"architecture \['hierarchy'\]; expected"),
        (lambda f: f['model'].pop('large'), r"hierarchy config: .*missing fields \['large'\]"),
        (lambda f: f['model'].update(colour='red'), r"unknown fields \['colour'\]"),
        (lambda f: f['model'].update(small=3), 'hierarchy config: small: 3; expected Config'),
        (lambda f: f['model'].update(strides=[2.5]), 'strides: 2.5; expected int'),
        (lambda f: f['model'].update(strides=[0]), 'Hierarchy.strides: .*expected numbers of at'),
        (lambda f: f['model']['small'].update(d_ff='8'), "config: small: d_ff: '8'; expected int"),
        (lambda f: f['model']['large'].update(n_heads=3), 'Config.n_heads: 3; expected'),
        (lambda f: f.update(bos=17), 'bos: 17; expected null or an id below 17'),
        (lambda f: f.update(metrics={'loss': 'low'}), "metrics: 'loss': 'low'; expected"),
        (lambda f: f.update(digest='0'), 'not what was saved: damaged'),
        # the transformer's config has other fields
        (lambda f: f.pop('architecture'), 'model config: unknown fields'),
    ],
)
def test_a_bad_config_names_file_and_field(copy, change, message):
    edit(copy, change)
    with pytest.raises(ValueError, match=message) as error:
        bundle.load(copy, architectures=ALL)
    assert str(copy) in str(error.value)


def test_damaged_parameters_are_noticed(copy):
    largest = max((f for f in copy.rglob('d/*') if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(ValueError, match='copy'):
        bundle.load(copy, architectures=ALL)


def test_leaves_on_disk_that_the_config_does_not_ask_for_are_all_named(copy):
    def change(fields):
        fields['model']['small'].update(tied=False, d_ff=9)
        fields['model']['large'].update(n_layers=1)

    edit(copy, change)
    with pytest.raises(ValueError) as error:
        bundle.load(copy, architectures=ALL)
    message = str(error.value)
    assert 'tables/output_VD is missing' in message
    assert 'small/layers/w_up_NDF is float32[1, 8, 8], expected float32[1, 8, 9]' in message
    assert 'large/layers/wq_NDHC is float32[2, 16, 2, 8], expected float32[1, 16, 2, 8]' in message


def spoiled(change):
    tree = weights()
    change(tree)
    return tree


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda t: t.update(head={'w_DV': np.zeros(3)}), 'head/w_DV is not part of this model'),
        (lambda t: t['pool'].clear(), 'pool/w_pool_DE is missing'),
        (lambda t: t['pool'].update(w_pool_DE=np.zeros((4, 16), np.float32)), 'is float32.4, 16.'),
        (lambda t: t['pool'].update(w_pool_DE=np.zeros((32, 16))), 'is float64.*expected float32'),
        (lambda t: t['pool'].update(w_pool_DE=None), 'w_pool_DE is NoneType'),
        (lambda t: t['pool'].update(w_pool_DE=1.0), 'w_pool_DE is float, expected'),
        (lambda t: t['pool'].update(bias_E=None), 'pool/bias_E is not part of this model'),
        (lambda t: t.update(head={}), 'nested as'),
    ],
)
def test_save_refuses_leaves_that_load_would_refuse(copy, change, message):
    for path in (copy, copy.with_name('new')):
        with pytest.raises(ValueError, match=f'not saved: params do not fit.*{message}'):
            save(path, spoiled(change))
    assert [x.name for x in copy.parent.iterdir()] == ['copy']  # and nothing begun beside it
    assert bundle.load(copy, architectures=ALL).metrics == {'bits_per_byte': 1.5}


def test_save_names_every_difference(tmp_path):
    def change(tree):
        del tree['tables']['input_VD']
        tree['small']['extra_D'] = np.zeros(8, np.float32)

    with pytest.raises(ValueError, match=r'input_VD is missing; small/extra_D is not part'):
        save(tmp_path / 'x', spoiled(change))


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'bos': 17}, 'bos: 17'),
        ({'bos': -1}, 'bos: -1'),
        ({'bos': np.int64(3)}, 'bos: '),
        ({'metrics': {'loss': np.float32(1)}}, "metrics: 'loss'"),
        ({'metrics': {'loss': [1.0]}}, "metrics: 'loss'"),
        ({'metrics': {3: 1.0}}, 'metrics: 3'),
        # a tuple comes back from JSON, not a list; and an int of NumPy is none of JSON's
        ({'config': dataclasses.replace(CONFIG, strides=[4])}, r'strides=\[4\].* is read as .*\(4'),
        ({'config': dataclasses.replace(CONFIG, strides=(np.int64(4),))}, 'is not valid as JSON'),
    ],
)
def test_save_refuses_fields_that_load_would_refuse(tmp_path, fields, message):
    with pytest.raises(ValueError, match=f'not saved: .*{message}'):
        save(tmp_path / 'x', weights(), **fields)
    assert not list(tmp_path.iterdir())


def test_metrics_that_are_not_finite_are_left_out(tmp_path):
    save(tmp_path / 'x', weights(), metrics={'loss': float('nan'), 'steps': 3})
    assert bundle.load(tmp_path / 'x', architectures=ALL).metrics == {'steps': 3}


def test_digests_of_two_architectures_differ_even_where_all_else_is_equal():
    other = HIERARCHY._replace(name='other')
    assert bundle.digest(CONFIG, weights(), other) != bundle.digest(CONFIG, weights(), HIERARCHY)
