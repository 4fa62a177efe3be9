"""The parts of the comparison that could be wrong without failing; little here is compiled."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.language_model import Fitted
from experiments.lexinvariant import (
    classical,
    config,
    counting,
    decipher,
    domains,
    models,
    results,
    tasks,
)
from lm.model import params, transformer
from tokenization.vocabularies.alphabet import AlphabetTokenizer

SETTINGS = config.SCALES['tiny']
SOURCE = b'''import os
def f(x):
    """Return the first of many words, which make a sentence and then a few more words.

    And another sentence, so that this string is long enough to count as prose for us.
    """
    y = """short"""
    # A comment of several lines, which is prose as well because people read it,
    # goes on here, with enough words that it is taken for what it is, a text,
    # and ends here.
    return x  # not this
'''


def test_prose_and_code_are_told_apart():
    prose, code = domains.prose(SOURCE), domains.code(SOURCE)
    assert prose.startswith(b'Return the first of many words')
    assert b'\n\nAnd another' in prose and b'A comment of several' in prose
    assert b'#' not in prose and b'short' not in prose and b'return' not in prose
    assert b'import os' in code and b'return x  # not this' in code and b'sentence' not in code


def test_pieces_are_spread_over_documents_and_never_cross_them():
    documents = [np.arange(10), np.arange(100, 103), np.arange(200, 209)]
    assert domains.chunks(documents, 4, 99).tolist() == [
        [0, 1, 2, 3], [4, 5, 6, 7], [200, 201, 202, 203], [204, 205, 206, 207],
    ]  # fmt: skip
    assert domains.chunks(documents, 4, 2).tolist() == [[0, 1, 2, 3], [204, 205, 206, 207]]


def test_counting_knows_nothing_but_the_text():
    piece = np.array([[0, 0, 1, 0, 1]])
    # after a: (1 + 1/4) / 2; then b at order 1, which has seen [a a]: order 0 gives (0 + 1/2) / 3
    order_0 = [(1 + 0.25) / 2, (0 + 1 * 0.25) / 3]
    order_1 = [order_0[0], (0 + 1 * order_0[1]) / 2]
    np.testing.assert_allclose(counting.nats(piece, 4, order=1)[:2], -np.log(order_1))
    renamed = np.array([3, 2, 0, 1])[piece]
    np.testing.assert_array_equal(counting.nats(piece, 4), counting.nats(renamed, 4))
    repeated = np.tile(np.arange(8), 8)[None]
    assert counting.nats(repeated, 8)[-1] < 0.3 < counting.nats(repeated, 8)[6]


def test_every_text_has_a_key_of_its_own():
    plain = np.tile(np.arange(64, dtype=np.int32), (3, 1))
    cipher = decipher.encipher(plain, 64, seed=0)
    assert (np.sort(cipher, axis=1) == plain).all()
    assert (cipher[0] != cipher[1]).mean() > 0.9
    np.testing.assert_array_equal(cipher, decipher.encipher(plain, 64, seed=0))


def test_a_symbols_positions_vote_on_its_meaning():
    plain, cipher = np.array([[0, 1, 0, 1]]), np.array([[2, 0, 2, 0]])
    p = np.array([[[0.4, 0.5, 0.1], [0.1, 0.8, 0.1], [0.9, 0.05, 0.05], [0.6, 0.3, 0.1]]])
    reading = decipher.Reading(plain, cipher, np.log(p))
    assert decipher.recovered_keys(reading, 4) == [{2: 0, 0: 1}]
    assert decipher.recovered_keys(reading, 1) == [{2: 1}]
    assert decipher.key_recovery([{2: 0, 0: 2}], reading, 4) == (0.5, 0)
    assert decipher.key_recovery([{2: 0, 0: 1}], reading, 4) == (1, 1)
    assert decipher.text_accuracy([{2: 0, 0: 2}], reading, 3) == pytest.approx(2 / 3)
    assert decipher.accuracy(reading, 4) == 0.5  # positions 2 and 3 of 4


def test_the_classical_attack_solves_a_long_cipher_and_not_a_short_one():
    random = np.random.default_rng(0)
    step = random.dirichlet(np.full(12, 0.15), 12) * 0.95 + 0.05 / 12
    text = [0]
    for _ in range(20_000):
        text.append(random.choice(12, p=step[text[-1]]))
    single, bigram = classical.statistics([np.array(text)], 12)
    plain = np.array(text[:2000])[None]
    cipher = decipher.encipher(plain.astype(np.int32), 12, seed=3)
    reading = decipher.Reading(plain, cipher, np.zeros((1, 1, 12)))
    solved = classical.attack(cipher[0], single, bigram, 8, seed=0)
    assert decipher.key_recovery([solved], reading, 2000) == (1, 1)
    few = classical.attack(cipher[0, :5], single, bigram, 8, seed=0)
    assert decipher.key_recovery([few], reading, 5)[0] < 1


def test_tasks_can_be_answered_from_their_text_alone():
    made = tasks.make(SETTINGS)
    for row in made[tasks.LOOKUP].tokens_BL:
        text = bytes(row.tolist()).decode()
        *pairs, last = text.split(',')
        name, value = last.split(':')
        assert dict(pair.split(':') for pair in pairs)[name] == value
        assert [chr(row[i]) for i in made[tasks.LOOKUP].answers] == [value]
    for row in made[tasks.PERMUTATION].tokens_BL:
        *examples, last = bytes(row.tolist()).decode().split(';')
        before, after = examples[0].split('>')
        order = [before.index(c) for c in after]
        given, answer = last.split('>')
        assert answer == ''.join(given[i] for i in order) != given
        assert ''.join(chr(row[i]) for i in made[tasks.PERMUTATION].answers) == answer


def test_an_answer_is_predicted_from_the_column_before_it(monkeypatch):
    """A model that repeats its last input is right where a symbol occurs twice in a row."""
    made = tasks.make(SETTINGS)[tasks.LOOKUP]
    shape = dataclasses.replace(SETTINGS.model, vocab_size=129, d_model=129, scale_embeddings=False)
    fitted = Fitted(shape, {'tables': {'input_VD': jax.numpy.eye(129)}}, 0.0)
    monkeypatch.setattr(
        transformer, 'forward', lambda params, config, tokens: jax.nn.one_hot(tokens, 129)
    )
    assert tasks.accuracy(fitted, made) == 0
    twice = made.tokens_BL.copy()
    twice[::2, made.answers.start - 1] = twice[::2, made.answers.start]
    assert tasks.accuracy(fitted, made._replace(tokens_BL=twice)) == 0.5


def test_positions_are_averaged_between_powers_of_two():
    assert results.spans(12) == [(0, 1), (1, 2), (2, 4), (4, 8), (6, 12)]


def test_regularised_models_rest_on_their_learned_rows():
    shape = models.model_config(SETTINGS, 0.2)
    assert models.at_rest(Fitted(shape, {}, 0.0)).config.lexinvariant is None
    whole = models.model_config(SETTINGS, 1.0)
    assert models.at_rest(Fitted(whole, {}, 0.0)).config == whole
    assert models.model_config(SETTINGS, 0.0).lexinvariant is None


@pytest.mark.parametrize('fields', [
    {'probabilities': (1.0,)}, {'contexts': (600,)}, {'symbols': 1}, {'bpe_domains': ('verse',)},
    {'bpe_size': 256}, {'queries': 0}, {'pairs': 32}, {'contexts': ()},
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(fields):
    with pytest.raises(ValueError, match=f'--{next(iter(fields))}'):
        dataclasses.replace(config.SCALES['demo'], **fields)


def test_the_paper_scale_is_of_the_papers_size():
    shape = models.model_config(config.SCALES['paper'], 1.0)
    assert params.count(shape) == pytest.approx(150e6, rel=0.05)


def test_characters_refuse_what_they_do_not_have(tmp_path):
    tokenizer = AlphabetTokenizer(b'abc')
    assert tokenizer.encode(b'cab').tolist() == [2, 0, 1]
    assert tokenizer.decode(np.array([2, 0])) == b'ca' and tokenizer.token_bytes(1) == b'b'
    with pytest.raises(ValueError, match='byte 0x7a at 2'):
        tokenizer.encode(b'abz')
    tokenizer.save(tmp_path / 'saved')
    assert AlphabetTokenizer.load(tmp_path / 'saved') == tokenizer
    with pytest.raises(ValueError, match='distinct'):
        AlphabetTokenizer(b'aa')
