"""Every architecture of the repository keeps one contract; a new one is a row of `CONFIGS`."""

import json

import jax
import numpy as np
import pytest

from decoding.drafts.adapter_architecture import AdapterConfig
from experiments.architectures import ARCHITECTURES
from lm.checkpoints import architecture, bundle
from lm.model import presets
from tokenization.transfer.hypernetwork import HypernetworkConfig
from tokenization.vocabularies.byte import ByteTokenizer

CONFIGS = {
    'transformer': presets.tiny(40),
    'hypernetwork': HypernetworkConfig(40, 16, n_layers=1, head_dim=8, pieces=3, chunk=16),
    'adapter': AdapterConfig(presets.tiny(40), 1),
}


def weights(name):
    """Returns parameters in which no two numbers are equal."""
    like = architecture.abstract(ARCHITECTURES[name], CONFIGS[name])
    values = iter(range(10**9))
    return jax.tree.map(
        lambda x: np.fromiter(values, x.dtype, x.size).reshape(x.shape) if x.size else x, like
    )


def test_every_architecture_is_tried_here():
    assert CONFIGS.keys() == ARCHITECTURES.keys()
    assert all(name == known.name for name, known in ARCHITECTURES.items())


@pytest.mark.parametrize('name', ARCHITECTURES)
class TestEach:
    def test_its_config_comes_back_from_json(self, name):
        known, config = ARCHITECTURES[name], CONFIGS[name]
        assert known.from_json(json.loads(json.dumps(known.to_json(config)))) == config

    def test_a_wrong_field_is_named(self, name):
        known, fields = ARCHITECTURES[name], ARCHITECTURES[name].to_json(CONFIGS[name])
        for field in fields:
            with pytest.raises(ValueError, match=field):
                known.from_json({**fields, field: [[]]})
        with pytest.raises(ValueError, match='colour'):
            known.from_json({**fields, 'colour': 'red'})
        for wrong in (None, [], 'x'):
            with pytest.raises(ValueError, match='config: '):
                known.from_json(wrong)

    def test_it_is_saved_and_loaded_whole_and_in_parts(self, name, tmp_path):
        known, config, tree = ARCHITECTURES[name], CONFIGS[name], weights(name)
        bundle.save(tmp_path / 'x', config, tree, ByteTokenizer(), None, architecture=known)
        loaded = bundle.load(tmp_path / 'x', architectures=ARCHITECTURES)
        assert loaded.config == config and loaded.architecture is known
        jax.tree.map(np.testing.assert_array_equal, loaded.params, tree)
        described = json.loads((tmp_path / 'x' / 'config.json').read_text())
        assert described.get('architecture', 'transformer') == name
        part = next(iter(tree))
        _, read = bundle.load_part(tmp_path / 'x', part, architectures=ARCHITECTURES)
        jax.tree.map(np.testing.assert_array_equal, read, tree[part])

    def test_a_leaf_too_many_is_not_saved(self, name, tmp_path):
        tree = {**weights(name), 'head_D': np.zeros(3, np.float32)}
        with pytest.raises(ValueError, match='head_D is not part of this model'):
            bundle.save(
                tmp_path / 'x', CONFIGS[name], tree, ByteTokenizer(), None,
                architecture=ARCHITECTURES[name],
            )  # fmt: skip
        assert not list(tmp_path.iterdir())


def test_an_adapter_begins_below_the_last_layer_of_its_target():
    for layers in (0, presets.tiny(40).n_layers):
        with pytest.raises(ValueError, match='expected at least 1, and fewer'):
            AdapterConfig(presets.tiny(40), layers)
