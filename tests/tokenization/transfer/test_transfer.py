"""Transfer and its heuristics: by hand on a tiny model, and the identity for its tokenizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.model import params, transformer
from lm.model.config import Config
from tokenization.transfer import heuristics, hypernetwork, transfer
from tokenization.transfer.hypernetwork import HypernetworkConfig
from tokenization.transfer.transfer import SourceModel, Vocabulary
from tokenization.vocabularies.bpe import BPETokenizer
from tokenization.vocabularies.byte import ByteTokenizer

TEXT = b'the cat sat on the mat and the dog sat on the log; then the cat ate the rat.\n' * 20
KEY = jax.random.key(3)
METHODS = (
    heuristics.random, heuristics.mean, heuristics.mean_of_pieces, heuristics.lexical_copy,
)  # fmt: skip


@pytest.fixture(scope='module')
def source():
    tokenizer = BPETokenizer.train([TEXT], 300)
    v = tokenizer.vocab_size
    config = Config(v + 3, 16, 1, 2, 2, 8, 32, max_length=16)  # BOS, and two rows of padding
    return SourceModel(config, params.init(config, jax.random.key(0)), tokenizer, v)


@pytest.fixture(scope='module')
def target():
    return BPETokenizer.train([TEXT[::-1], TEXT[:400]], 290)


def _neighbours(target):
    return heuristics.neighbours(heuristics.context_vectors(target, [TEXT], contexts=32))


@pytest.mark.parametrize('which', range(5))
def test_every_method_makes_whole_tables_and_copies_special_rows(source, target, which):
    method = (*METHODS, _neighbours(target))[which]
    vocabulary = transfer.vocabulary(source, target)
    tables = method(source, vocabulary, KEY)
    config, weights = transfer.with_tables(source, vocabulary, tables)
    assert config.vocab_size == target.vocab_size + 1
    for name, rows_VD in weights['tables'].items():
        assert rows_VD.shape == (config.vocab_size, 16) and jnp.isfinite(rows_VD).all()
        np.testing.assert_array_equal(rows_VD[-1], source.params['tables'][name][source.bos])
    assert weights['body'] is source.params['body']


@pytest.mark.parametrize('which', range(3))
def test_its_own_tokenizer_gives_the_model_back(source, which):
    """If the source has every token, its rows are found, and the logits are the source's."""
    method = (
        heuristics.mean_of_pieces, heuristics.lexical_copy, _neighbours(source.tokenizer),
    )[which]  # fmt: skip
    vocabulary = transfer.vocabulary(source, source.tokenizer)
    config, weights = transfer.with_tables(source, vocabulary, method(source, vocabulary, KEY))
    tokens_BL = np.array([[source.bos, 5, 270, 280, 9]])
    logits = transformer.forward(weights, config, tokens_BL)
    own = transformer.forward(source.params, source.config, tokens_BL)
    np.testing.assert_allclose(logits, own[..., : config.vocab_size], atol=1e-5)


def test_a_hypernetwork_is_a_method(source, target):
    shape = HypernetworkConfig(n_layers=1, head_dim=8, residual=True)
    shape = hypernetwork.for_model(shape, source.config, source.tokenizer.vocab_size)
    weights = hypernetwork.init(shape, source.params['tables'], KEY)
    vocabulary = transfer.vocabulary(source, target)
    tables = transfer.predicted(weights, shape)(source, vocabulary, KEY)
    short = [
        i for i, n in enumerate((transfer.pieces(source, vocabulary, 9) >= 0).sum(1)) if n <= 7
    ]
    by_hand = heuristics.mean_of_pieces(source, vocabulary, KEY)
    for name in tables:  # untrained, with a residual: the mean of the pieces
        np.testing.assert_allclose(
            tables[name][np.array(short[:-1])], by_hand[name][np.array(short[:-1])], atol=1e-5
        )


class TestHeuristics:
    def test_random_rows_have_the_source_statistics(self, source):
        many = Vocabulary((b'x',) * 20_000, {})
        rows = heuristics.random(source, many, KEY)['input_VD']
        own = source.params['tables']['input_VD'][: source.tokenizer.vocab_size]
        np.testing.assert_allclose(rows.mean(0), own.mean(0), atol=0.01)
        np.testing.assert_allclose(rows.std(0), own.std(0), rtol=0.03)

    def test_mean_of_pieces_by_hand(self, source):
        one, two = source.tokenizer.encode(b'th').tolist(), source.tokenizer.encode(b'zq').tolist()
        rows = heuristics.mean_of_pieces(source, Vocabulary((b'th', b'zq'), {}), KEY)
        for name, table_VD in source.params['tables'].items():
            np.testing.assert_allclose(rows[name][0], table_VD[np.array(one)].mean(0), atol=1e-6)
            np.testing.assert_allclose(rows[name][1], table_VD[np.array(two)].mean(0), atol=1e-6)

    def test_sparsemax_is_the_projection_onto_the_simplex(self):
        logits = np.array([[0.5, 0.4, -1.0], [3.0, 1.0, 0.0], [0.2, 0.2, 0.2]])
        weights = heuristics.sparsemax(logits)
        np.testing.assert_allclose(weights.sum(1), 1)
        np.testing.assert_allclose(weights[:2], [[0.55, 0.45, 0], [1, 0, 0]])
        np.testing.assert_allclose(weights[2], 1 / 3)
        nudge = np.random.default_rng(0).dirichlet(np.ones(3), 200)
        nearest = ((logits[0] - weights[0]) ** 2).sum()
        assert (((logits[0] - nudge) ** 2).sum(1) >= nearest).all()

    def test_neighbours_are_tokens_of_the_same_company(self, source):
        """A new token with the contexts of a shared one gets that token's row."""
        tokens = (b'a', b'b', b'new')
        vectors = np.array([[1, 0], [0, 1], [0.99, 0.1]], np.float32)
        method = heuristics.neighbours(lambda _: vectors, most=2)
        rows = method(source, Vocabulary(tokens, {}), KEY)['input_VD']
        table_VD = source.params['tables']['input_VD']
        a, b = (table_VD[source.tokenizer.encode(x)[0]] for x in tokens[:2])
        np.testing.assert_allclose(rows[0], a, atol=1e-6)
        weights = heuristics.sparsemax(np.array([[0.99, 0.1]]))[0]
        np.testing.assert_allclose(rows[2], weights[0] * a + weights[1] * b, atol=1e-5)

    def test_context_vectors_are_unit_and_see_both_sides(self):
        tokenizer = ByteTokenizer()
        vectors = heuristics.context_vectors(tokenizer, [b'xaybxazb' * 40], contexts=8)
        rows = vectors([bytes([i]) for i in range(256)] + [b''])
        assert rows.shape == (257, 2 * 8)
        norms = np.linalg.norm(rows, axis=1)
        np.testing.assert_allclose(norms[[ord(x) for x in 'abxyz']], 1, rtol=1e-6)
        assert not norms[[0, 256]].any()
        same = rows[ord('y')] @ rows[ord('z')]  # both occur between a and b
        assert same > 0.99 > rows[ord('a')] @ rows[ord('y')] + 0.5


class TestVocabulary:
    class Fake(ByteTokenizer):
        def __init__(self, tokens):
            object.__setattr__(self, 'tokens', tokens)

        vocab_size = property(lambda self: len(self.tokens))

        def token_bytes(self, token):
            return self.tokens[token]

    @pytest.mark.parametrize(
        ('tokens', 'error'),
        [
            ([], 'empty'),
            ([bytes([i]) for i in range(255)], '1 single bytes, 255 first'),
        ],
    )
    def test_refuses_what_would_be_garbage(self, source, tokens, error):
        with pytest.raises(ValueError, match=error):
            transfer.vocabulary(source, self.Fake(tokens))

    def test_a_second_id_for_the_same_bytes_is_of_no_use(self, source):
        tokens = [bytes([i]) for i in range(256)] + [b'A', b'']
        found = transfer.vocabulary(source, self.Fake(tokens))
        assert found.tokens == (*tokens[:256], b'', b'', b'') and found.copied == {258: source.bos}
        tables = heuristics.mean_of_pieces(source, found, KEY)
        _, weights = transfer.with_tables(source, found, tables)
        own_VD = source.params['tables']['output_VD']
        mean_D = own_VD[: source.tokenizer.vocab_size].mean(0)
        for i in (256, 257):
            np.testing.assert_allclose(weights['tables']['output_VD'][i], mean_D, atol=1e-6)

    def test_special_tokens_are_matched_by_role(self, source):
        target = self.Fake([*(bytes([i]) for i in range(256)), b'', b''])
        target.__dict__['special'] = {'eos': 256, 'bos': 257}
        found = transfer.vocabulary(source, target)
        assert found.copied == {257: source.bos, 258: source.bos}


class TestAddTask:
    def test_weight_zero_keeps_the_variant_and_one_adds_the_difference(self):
        config = Config(8, 4, 1, 1, 1, 4, 4)
        base, tuned, moved = (params.init(config, jax.random.key(i)) for i in range(3))
        kept = transfer.add_task(tuned, moved, base, 0.0)
        jax.tree.map(np.testing.assert_array_equal, kept['body'], tuned['body'])
        jax.tree.map(np.testing.assert_array_equal, kept['tables'], moved['tables'])
        same = transfer.add_task(tuned, {**moved, 'body': base['body']}, base, 0.7)
        jax.tree.map(np.testing.assert_array_equal, same['body'], tuned['body'])
        whole = transfer.add_task(base, moved, base, 1.0)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), whole['body'], moved['body']
        )


def test_tied_models_have_one_table(source, target):
    config = dataclasses.replace(source.config, tied=True)
    tied = source._replace(config=config, params=params.init(config, jax.random.key(0)))
    vocabulary = transfer.vocabulary(tied, target)
    for method in METHODS:
        assert set(method(tied, vocabulary, KEY)) == {'input_VD'}
