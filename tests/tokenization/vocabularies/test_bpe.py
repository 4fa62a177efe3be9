"""BPE: lossless for any bytes, with the segmentation of its trainer."""

import base64
import itertools
import pickle
import re
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from experiments import corpora
from tokenization.vocabularies import bpe, patterns, spelling
from tokenization.vocabularies.byte import ByteTokenizer

VOCABULARY = 800


@pytest.fixture(scope='module')
def documents() -> list[bytes]:
    library = corpora.standard_library()
    return [library.train[i] for i in range(0, 60, 2)]


@pytest.fixture(scope='module')
def tokenizer(documents) -> bpe.BPETokenizer:
    return bpe.BPETokenizer.train(documents, VOCABULARY)


texts = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=40).map(str.encode),
    st.lists(st.one_of(st.text(max_size=9).map(str.encode), st.binary(max_size=4)), max_size=9).map(
        b''.join
    ),
)


@settings(max_examples=300, deadline=None)
@given(texts)
@example(b'')
@example(b'\xed\xa0\x80')  # a surrogate, which UTF-8 forbids
@example('é'.encode()[:1])
@example(b'a\xf0\x9f\x98 b')  # an emoji cut short
@example(bytes(range(256)))
def test_decode_inverts_encode(tokenizer, data):
    ids = tokenizer.encode(data)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == data
    assert b''.join(tokenizer.token_bytes(i) for i in ids) == data


def by_hugging_face(tokenizer: bpe.BPETokenizer) -> tokenizers.Tokenizer:
    """Returns the vocabulary as a `tokenizers` model, with the merges that its ranks imply."""
    letters = {byte: letter for letter, byte in spelling.byte_of_letter().items()}
    spelled = [''.join(letters[byte] for byte in token) for token in tokenizer.tokens]
    rank = {word: i for i, word in enumerate(spelled)}
    merges = []
    for i, word in enumerate(spelled):
        if len(word) > 1:  # apply the merges before it: two parts remain
            parts = list(word)
            while len(parts) > 2:
                ranks = [rank.get(a + b, i) for a, b in itertools.pairwise(parts)]
                k = int(np.argmin(ranks))
                assert ranks[k] < i
                parts[k : k + 2] = [parts[k] + parts[k + 1]]
            merges.append(tuple(parts))
    model = tokenizers.Tokenizer(models.BPE(vocab=rank, merges=merges))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return model


def test_segmentation_equals_that_of_tokenizers(tokenizer, documents):
    reference = by_hugging_face(tokenizer)
    held_out = [corpora.standard_library().test[i] for i in range(10)]
    for document in [*documents[:5], *held_out, "It's  2 naïve façades,\n\n\tor 三 😀!".encode()]:
        text = document.decode('utf-8')
        np.testing.assert_array_equal(tokenizer.encode(document), reference.encode(text).ids)


def test_training_compresses_and_is_deterministic(tokenizer, documents):
    assert tokenizer.vocab_size == len(set(tokenizer.tokens)) == VOCABULARY
    assert {t for t in tokenizer.tokens if len(t) == 1} == {bytes([b]) for b in range(256)}
    size = sum(map(len, documents))
    assert sum(len(ids) for ids in tokenizer.encode_batch(documents)) < size / 2
    assert bpe.BPETokenizer.train(documents, VOCABULARY) == tokenizer


def test_training_on_little_or_on_no_text():
    assert bpe.BPETokenizer.train([b'', b'\xff\xfe'], 300).vocab_size == 256
    small = bpe.BPETokenizer.train([b'abab\xff abab'], 300)
    assert 256 < small.vocab_size < 300
    assert small.decode(small.encode(b'abab\xff\x00c')) == b'abab\xff\x00c'
    with pytest.raises(ValueError, match='at least 256'):
        bpe.BPETokenizer.train([b'abc'], 255)


def test_bytes_that_are_not_utf8_do_not_change_the_text_beside_them(tokenizer):
    left, right = b'import numpy as np', b'return self.value'
    joined = tokenizer.encode(left + b'\xff\xfe' + right)
    parts = [left, b'\xff', b'\xfe', right]
    np.testing.assert_array_equal(joined, np.concatenate([tokenizer.encode(p) for p in parts]))


def test_encode_batch_equals_encode(tokenizer, documents):
    for ids, document in zip(tokenizer.encode_batch(documents), documents):
        np.testing.assert_array_equal(ids, tokenizer.encode(document))


@pytest.mark.parametrize('unit', [b'a', b' ', b'\n', b'\x00', b'\xff', b'(', b' \n', b'1'])
def test_a_megabyte_of_one_byte_takes_linear_time(tokenizer, unit):
    data = unit * (1_000_000 // len(unit))
    start = time.perf_counter()
    ids = tokenizer.encode(data)
    assert time.perf_counter() - start < 10  # 0.5 s alone on such a machine
    assert tokenizer.decode(ids) == data


def test_only_long_runs_are_cut():
    words = 'some words ' * 30_000
    assert list(bpe._without_long_runs(words)) == [words]
    run = 'x y' + ' ' * 400_000 + 'z'
    pieces = list(bpe._without_long_runs(run))
    assert ''.join(pieces) == run
    assert max(map(len, pieces)) <= 2 * bpe._BLOCK


def test_save_load_and_pickle(tokenizer, tmp_path):
    tokenizer.save(tmp_path / 'bpe')
    assert bpe.BPETokenizer.load(tmp_path / 'bpe') == tokenizer
    tokenizer.encode(b'x')  # builds what is not pickled
    again = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(again.encode(b'import os'), tokenizer.encode(b'import os'))


def test_reads_rank_files_of_tiktoken(tmp_path, tokenizer):
    lines = [base64.b64encode(t) + b' %d' % i for i, t in enumerate(tokenizer.tokens)]
    (tmp_path / 'x.tiktoken').write_bytes(b'\r\n'.join(reversed(lines)))
    read = bpe.BPETokenizer.from_tiktoken_file(tmp_path / 'x.tiktoken', patterns.GPT2_PATTERN)
    assert read == tokenizer


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda lines: [*lines[:9], b'!!! 9', *lines[10:]], 'line 10: expected base64'),
        (lambda lines: [*lines[:9], b'YQ==', *lines[10:]], 'line 10: expected base64'),
        (lambda lines: [*lines[:9], lines[8], *lines[10:]], 'line 10: duplicate rank 8 or token'),
        (lambda lines: [*lines[:300], *lines[301:]], 'rank 300 is missing'),
        (lambda lines: lines[:200], '56 of the 256 single bytes are missing'),
        (lambda lines: lines[:-1], 'has 799 tokens, tessera.json expects 800'),
        (lambda lines: [], '256 of the 256 single bytes are missing'),
    ],
)
def test_damaged_rank_files_are_named(tokenizer, tmp_path, damage, message):
    tokenizer.save(tmp_path)
    ranks = tmp_path / 'ranks.tiktoken'
    ranks.write_bytes(b'\n'.join(damage(ranks.read_bytes().splitlines())))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        bpe.BPETokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_and_foreign_folders_are_named(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match='no tokenizer here'):
        bpe.BPETokenizer.load(tmp_path)
    tokenizer.save(tmp_path / 'bpe')
    (tmp_path / 'bpe' / 'ranks.tiktoken').unlink()
    with pytest.raises(FileNotFoundError, match=r'ranks\.tiktoken: no such file'):
        bpe.BPETokenizer.load(tmp_path / 'bpe')
    ByteTokenizer().save(tmp_path / 'byte')
    with pytest.raises(ValueError, match="kind 'byte', expected"):
        bpe.BPETokenizer.load(tmp_path / 'byte')


def test_ids_out_of_range_are_named(tokenizer):
    for bad in (VOCABULARY, -1):
        with pytest.raises(ValueError, match=f'id {bad} at position 2 is out of range'):
            tokenizer.decode(np.array([0, 1, bad]))
        with pytest.raises(ValueError, match=f'id {bad} '):
            tokenizer.token_bytes(bad)


def test_a_pattern_that_would_lose_text_is_refused(tokenizer):
    words_only = bpe.BPETokenizer(tokenizer.tokens, r'\w+')
    assert words_only.decode(words_only.encode(b'abc')) == b'abc'
    with pytest.raises(ValueError, match='does not match every character'):
        words_only.encode(b'a b')


@pytest.mark.parametrize(
    ('pattern', 'words'),
    [
        (patterns.GPT2_PATTERN, ['Don', "'t", ' stop', '12345', '!?', '\n \n ', ' CamelCase']),
        (
            patterns.CL100K_PATTERN,
            ['Don', "'t", ' stop', '123', '45', '!?\n', ' \n', ' ', ' CamelCase'],
        ),
        (
            patterns.O200K_PATTERN,
            ["Don't", ' stop', '123', '45', '!?\n', ' \n', ' ', ' Camel', 'Case'],
        ),
    ],
)
def test_patterns_of_known_files(pattern, words):
    """Every word is a token of the vocabulary, and no token crosses a boundary."""
    text = "Don't stop12345!?\n \n  CamelCase"
    assert ''.join(words) == text
    spans = {text[i:j].encode() for i in range(len(text)) for j in range(i + 2, len(text) + 1)}
    # Merges of all pairs from the left: every pretoken becomes one token.
    tokens = [bytes([byte]) for byte in range(256)]
    tokenizer = bpe.BPETokenizer((*tokens, *sorted(spans, key=len)), pattern)
    assert [tokenizer.token_bytes(i).decode() for i in tokenizer.encode(text.encode())] == words
