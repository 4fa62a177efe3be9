"""The parts of the comparison that could be wrong without failing."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from experiments.corpora import Corpus
from experiments.transfer import (
    config,
    dynamic,
    hyper,
    main,
    measure,
    results,
    targets,
    variant,
)
from experiments.transfer.source import open_source
from lm.checkpoints import bundle
from lm.devices import mesh as mesh_lib
from lm.model import params, transformer
from lm.model.config import Config as ModelConfig
from tokenization.coding.ngram import count
from tokenization.equal_info.compiler import compile_equal_info
from tokenization.huggingface.tokenizer import HuggingFaceTokenizer
from tokenization.transfer import heuristics, hypernetwork, transfer
from tokenization.transfer.hypernetwork import HypernetworkConfig
from tokenization.transfer.transfer import SourceModel
from tokenization.vocabularies.bpe import BPETokenizer
from tokenization.vocabularies.byte import ByteTokenizer

TEXT = b'the cat sat on the mat and the dog sat on the log; then the cat ate the rat.\n' * 8
SETTINGS = config.SCALES['tiny']


@pytest.fixture(scope='module')
def mesh():
    return mesh_lib.make(devices=jax.devices()[:1])


@pytest.fixture(scope='module')
def source():
    tokenizer = BPETokenizer.train([TEXT], 290)
    v = tokenizer.vocab_size
    model = ModelConfig(v + 1, 16, 1, 2, 2, 8, 16, max_length=32)
    return SourceModel(model, params.init(model, jax.random.key(0)), tokenizer, v)


@pytest.fixture(scope='module')
def network(source):
    shape = HypernetworkConfig(n_layers=1, head_dim=8, pieces=3, residual=True, chunk=64)
    shape = hypernetwork.for_model(shape, source.config, source.tokenizer.vocab_size)
    weights = hypernetwork.init(shape, source.params['tables'], jax.random.key(1))
    return hyper.Trained(shape, weights, 0.0)


def _bits_by_hand(source, rows) -> float:
    """Returns bits per byte of rows of ids, each after BOS, from the full logits."""
    bits, n_bytes = 0.0, 0
    for ids in rows:
        tokens = np.array([[source.bos, *ids[:-1]]])
        logits = transformer.forward(source.params, source.config, tokens)[0]
        log_p = jax.nn.log_softmax(logits)
        bits -= float(jnp.take_along_axis(log_p, np.array(ids)[:, None], 1).sum()) / math.log(2)
        n_bytes += len(source.tokenizer.decode(np.array(ids)))
    return bits / n_bytes


class TestDynamic:
    def test_without_merges_it_is_the_source_and_then_texts_get_shorter(
        self, source, network, mesh
    ):
        ids = source.tokenizer.encode(TEXT[:150])
        found = dynamic.measure(SETTINGS, source, network, [ids], [ids], mesh)
        none, half = found
        assert (none['share'], none['merges'], none['reduction'], none['names']) == (0, 0, 0, 0)
        rows = [ids[i : i + 32] for i in range(0, len(ids), 32)]
        # nearly exact: cached rows that are not used get no probability
        assert none['bits_per_byte'] == pytest.approx(_bits_by_hand(source, rows), rel=1e-5)
        assert half['merges'] > 0 and 0.02 < half['reduction'] < 1
        names = sum(2 * math.log2(source.tokenizer.vocab_size + i) for i in range(half['merges']))
        assert half['names'] == pytest.approx(names * 1 / 150, rel=1e-6)

    def test_texts_are_packed_one_to_a_row(self):
        batch = dynamic._packed([np.array([5, 6, 7]), np.array([8])], 3, 4, bos=9)
        assert batch['tokens'][:2].tolist() == [[9, 5, 6, 7], [9, 8, 0, 0]]
        assert batch['targets'][:2].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
        assert batch['weights'].sum(1).tolist() == [3, 1, 0]
        assert batch['segments'].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [0] * 4]


def _imported(source):
    """Returns the model with BOS among the tokenizer's ids, as in Hugging Face models."""
    model = dataclasses.replace(source.config, vocab_size=source.bos + 30)
    return SourceModel(model, params.init(model, jax.random.key(0)), source.tokenizer, 5)


@pytest.mark.parametrize('kind', ['trained', 'imported'])
def test_before_it_is_moved_a_model_is_what_it_was(source, network, mesh, kind):
    if kind == 'imported':
        source = _imported(source)
    text = TEXT[:60]
    ids = source.tokenizer.encode(text)
    assert len(ids) <= SETTINGS.continued.length
    expected = _bits_by_hand(source, [ids])
    bits = measure.bits_per_byte(measure.unmoved(source), SETTINGS, [text], mesh)
    assert bits == pytest.approx(expected, rel=1e-5)
    # without any merges, units get no probability
    none = dynamic.measure(SETTINGS, source, network, [ids], [ids], mesh)[0]
    assert none['bits_per_byte'] == pytest.approx(expected, rel=1e-5)


def test_moved_to_its_own_tokenizer_a_model_is_what_it_was(source, mesh):
    own = measure.move(source, source.tokenizer, heuristics.lexical_copy, mesh)
    for name, rows_VD in source.params['tables'].items():
        np.testing.assert_array_equal(own.fitted.params['tables'][name], rows_VD)


def test_documents_of_a_model_without_bos_begin_behind_eos(mesh, tmp_path):
    """As in Qwen, where only the EOS of the previous document precedes a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    described = {
        'model': {'type': 'BPE', 'vocab': {x: i for i, x in enumerate(letters)}, 'merges': []},
        'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': False},
        'added_tokens': [{'id': 256, 'content': '<|endoftext|>', 'special': True}],
    }
    for names, bos in ({'eos': '<|endoftext|>'}, 256), ({}, None):
        tokenizer = HuggingFaceTokenizer.from_json(json.dumps(described), names)
        model = ModelConfig(257, 8, 1, 1, 1, 8, 8)
        weights = params.init(model, jax.random.key(0))
        bundle.save(tmp_path / 'qwen', model, weights, tokenizer, None)
        given = dataclasses.replace(SETTINGS, bundle=str(tmp_path / 'qwen'))
        if bos is not None:
            assert open_source(given, None, tmp_path, mesh).bos == bos
            continue
        with pytest.raises(ValueError, match='no id that starts documents'):
            open_source(given, None, tmp_path, mesh)


@pytest.fixture
def saved_network(source, network, tmp_path):
    """A given model, and its hypernetwork as a bundle; nothing may be trained."""
    bundle.save(
        tmp_path / 'network', network.config, network.weights, source.tokenizer, None,
        {'train_seconds': 7.0}, architecture=hypernetwork.ARCHITECTURE,
    )  # fmt: skip
    path = str(tmp_path / 'network')
    return dataclasses.replace(SETTINGS, bundle='given', hypernetwork_bundle=path)


class TestHypernetworkBundle:
    def test_it_predicts_what_the_trained_one_does(
        self, source, network, mesh, saved_network, tmp_path
    ):
        loaded = hyper.open_network(saved_network, source, None, tmp_path / 'out', mesh)
        assert (loaded.config, loaded.seconds) == (network.config, 7.0)
        assert not (tmp_path / 'out').exists()  # nothing was trained
        moved = [
            measure.move(source, ByteTokenizer(), transfer.predicted(x.weights, x.config), mesh)
            for x in (network, loaded)
        ]
        jax.tree.map(np.testing.assert_array_equal, *(x.fitted.params for x in moved))

    def test_it_computes_in_the_dtype_of_the_model(self, source, mesh, saved_network, tmp_path):
        half = source._replace(config=dataclasses.replace(source.config, dtype='bfloat16'))
        assert hyper.open_network(saved_network, half, None, tmp_path, mesh).config.dtype == (
            'bfloat16'
        )

    def test_one_of_another_model_or_tokenizer_is_refused(
        self, source, mesh, saved_network, tmp_path
    ):
        tied = dataclasses.replace(source.config, tied=True)
        with pytest.raises(ValueError, match=r'hypernetwork_bundle .*: tied False, and the model'):
            hyper.open_network(saved_network, source._replace(config=tied), None, tmp_path, mesh)
        # as many merges, of other letters
        text = TEXT.translate(bytes.maketrans(b'ab', b'ba'))
        other = source._replace(tokenizer=BPETokenizer.train([text], 290))
        with pytest.raises(ValueError, match=r'hypernetwork_bundle .*: .* another tokenizer'):
            hyper.open_network(saved_network, other, None, tmp_path, mesh)

    def test_a_bundle_of_a_language_model_is_none(self, source, mesh, tmp_path):
        path = tmp_path / 'model'
        bundle.save(path, source.config, source.params, source.tokenizer, source.bos)
        given = dataclasses.replace(SETTINGS, bundle='given', hypernetwork_bundle=str(path))
        with pytest.raises(ValueError, match="architecture 'transformer'; expected hypernetwork"):
            hyper.open_network(given, source, None, tmp_path, mesh)

    def test_its_training_is_not_checked(self, source, saved_network):
        four = mesh_lib.make('data=4', jax.devices('cpu')[:4])
        odd = dataclasses.replace(SETTINGS.transfer, batch_size=3)
        with pytest.raises(ValueError, match=r'transfer\.batch_size'):
            main._check(dataclasses.replace(SETTINGS, transfer=odd), source.config, four)
        main._check(dataclasses.replace(saved_network, transfer=odd), source.config, four)

    def test_it_is_saved_once_and_a_resumed_run_finds_it(
        self, source, network, mesh, tmp_path, monkeypatch
    ):
        trained = [network._replace(seconds=5.0), network._replace(seconds=0.1)]
        monkeypatch.setattr(hyper, '_fit', lambda *arguments: trained.pop(0))
        path = tmp_path / 'bundles' / 'hypernetwork' / 'config.json'
        first = hyper.open_network(SETTINGS, source, None, tmp_path, mesh)
        written = path.stat().st_mtime_ns
        again = hyper.open_network(SETTINGS, source, None, tmp_path, mesh)
        assert (first.seconds, again.seconds) == (5.0, 5.0)
        assert path.stat().st_mtime_ns == written
        assert json.loads(path.read_text())['metrics'] == {'train_seconds': 5.0}


def test_rows_are_held_where_they_began(source):
    start = source.params['tables']
    assert measure.distance_of_rows(start, start) == 0
    off = {name: x.at[0].add(1.0) for name, x in start.items()}
    norms = [jnp.sqrt((x**2).sum(-1)).mean() for x in start.values()]
    v, d = start['input_VD'].shape
    expected = np.mean([d / v / norm for norm in norms])
    np.testing.assert_allclose(measure.distance_of_rows(off, start), expected, rtol=1e-5)


def test_a_codec_of_distinct_strings_writes_the_same_pieces():
    codec = compile_equal_info(count([TEXT], 2).model(), 'canonical', 64)
    once = targets.distinct(codec)
    assert once.vocab_size == codec.written.sum() < codec.vocab_size
    tokens = [once.token_bytes(i) for i in range(once.vocab_size)]
    assert len(set(tokens)) == len(tokens)
    pieces = [
        [tokenizer.token_bytes(int(i)) for i in tokenizer.encode(TEXT[:200])]
        for tokenizer in (codec, once)
    ]
    assert pieces[0] == pieces[1]


def test_a_variant_moves_by_what_its_base_learned(source, mesh, tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, variants=('bytes',), shots=(0,))
    moved = measure.move(source, ByteTokenizer(), heuristics.mean_of_pieces, mesh)
    body = jax.tree.map(lambda x: x + 0.1, moved.fitted.params['body'])
    weights = {**moved.fitted.params, 'body': body}
    bundle.save(
        tmp_path / 'bundles' / 'bytes_0', moved.fitted.config, weights, ByteTokenizer(), 256
    )
    prose = Corpus('', *[[b'"""' + TEXT + b'"""']] * 3)
    monkeypatch.setattr(variant.corpora, 'standard_library', lambda: prose)
    found = variant.rows(settings, source, {'bytes': ByteTokenizer()}, tmp_path, mesh)
    kinds = [(row['target'], row['model'], row['weight']) for row in found]
    assert kinds == [
        ('own', 'base', None), ('own', 'variant', None), ('bytes', 'base', None),
        ('bytes', 'variant', 0.0), ('bytes', 'variant', 0.5),
    ]  # fmt: skip
    bits = [row['bits_per_byte'] for row in found]
    assert bits[1] < bits[0] and len(set(bits)) == 5  # it has learned; the weight matters
    metrics = results.variants(found)
    assert metrics['prose_bits_per_byte/variant/target=bytes/weight=0.5'] == bits[4]


def test_sequences_may_be_cut_and_source_ids_are_none(source):
    cut = mesh_lib.make('data=2,sequence=2', jax.devices('cpu')[:4])
    main._check(SETTINGS, source.config, cut)
    for name, change in (('continued', {'length': 30}), ('identity', {'batch_size': 3})):
        run = dataclasses.replace(getattr(SETTINGS, name), **change)
        with pytest.raises(ValueError, match=f'{name}.{next(iter(change))}.*expected'):
            main._check(dataclasses.replace(SETTINGS, **{name: run}), source.config, cut)
