"""Arithmetic-coded documents as ids: exact round trips from ids alone, and clear errors."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from tokenization import tokenizer
from tokenization.coding import byte_coder, ngram
from tokenization.coding.arithmetic_tokenizer import ArithmeticTokenizer

TEXT = b'the cat sat on the mat, the rat that sat on the hat ate the cat that sat\n' * 4
NGRAM = ngram.count([TEXT], order=2)
TOKENIZERS = {bits: ArithmeticTokenizer(NGRAM, bits) for bits in (8, 16)}


@pytest.mark.parametrize('bits', [8, 16])
@hypothesis.given(data=st.binary(max_size=200))
@hypothesis.example(data=b'')
@hypothesis.example(data=b'\0')
@hypothesis.example(data=b'\0' * 200)
@hypothesis.example(data=TEXT[:200])
def test_round_trip(bits, data):
    tokens = TOKENIZERS[bits]
    ids = tokens.encode(data)
    assert ids.dtype == np.int32 and (len(ids) > 0) == (len(data) > 0)
    assert tokens.decode(ids) == data


def test_all_bytes_and_long_runs_come_back_in_batches():
    documents = [bytes(range(256)), b'', b'\0' * 5000, TEXT, b'\xff', b'', TEXT * 3]
    for bits, tokens in TOKENIZERS.items():
        sequences = tokens.encode_batch(documents)
        for document, ids in zip(documents, sequences):
            np.testing.assert_array_equal(ids, tokens.encode(document))
            assert ids.size == 0 or 0 <= ids.min() <= ids.max() < 2**bits
        assert tokens.decode_batch(sequences) == documents
    assert tokens.encode_batch([]) == [] and tokens.decode_batch([]) == []


def test_ids_are_the_length_and_the_code_of_the_model():
    """Coding whole documents and stepping the model byte by byte give the same stream."""
    for data in (TEXT, b'unseen \xf0\xf1'):
        (code,) = byte_coder.encode_bytes(NGRAM.model(14), [data], batch=2)
        length = bytes([len(data)]) if len(data) < 128 else bytes([len(data) % 128 | 128, 2])
        assert bytes(TOKENIZERS[8].encode(data).astype(np.uint8)) == length + code


def test_sixteen_bits_are_pairs_of_eight():
    for size in range(1, 9):
        single, double = (TOKENIZERS[bits].encode(TEXT[:size]) for bits in (8, 16))
        assert len(double) == -(-len(single) // 2)
        pairs = np.append(single, 0)[: 2 * len(double)].reshape(-1, 2)
        np.testing.assert_array_equal(double, pairs @ [256, 1])


def test_it_compresses_what_the_model_knows():
    ids = TOKENIZERS[8].encode(TEXT)
    assert len(TEXT) / len(ids) > 4


@pytest.mark.parametrize('bits', [8, 16])
def test_every_truncation_is_refused(bits):
    tokens = TOKENIZERS[bits]
    ids = tokens.encode(TEXT[:150] + b'\xf0')
    for size in range(1, len(ids)):
        with pytest.raises(ValueError, match='truncated'):
            tokens.decode(ids[:size])
    with pytest.raises(ValueError, match='truncated or damaged'):
        tokens.decode(np.append(ids, 0))


@pytest.mark.parametrize(
    ('ids', 'message'),
    [
        ([3, 256], 'id 256 at position 1'),
        ([-1], 'id -1 at position 0'),
        ([255] * 5, 'length of a document'),
        ([255] * 9 + [127], 'cannot hold'),
        ([0], 'not the code of any document'),
        ([[1, 2]], 'vector'),
    ],
)
def test_bad_ids_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        TOKENIZERS[8].decode(np.array(ids))


def test_an_id_has_no_bytes_of_its_own():
    assert [TOKENIZERS[bits].vocab_size for bits in (8, 16)] == [256, 65536]
    with pytest.raises(ValueError, match='no fixed bytes'):
        TOKENIZERS[8].token_bytes(7)


def test_save_and_load(tmp_path):
    tokens = ArithmeticTokenizer(NGRAM, bits_per_token=16, precision=16)
    tokens.save(tmp_path / 'saved')
    loaded = ArithmeticTokenizer.load(tmp_path / 'saved')
    assert (loaded.bits_per_token, loaded.precision) == (16, 16)
    ids = tokens.encode(TEXT)
    np.testing.assert_array_equal(loaded.encode(TEXT), ids)
    assert loaded.decode(ids) == TEXT


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'kind': 'byte'}, "kind 'byte'"),
        ({'kind': 'arithmetic', 'bits_per_token': 8}, 'precision'),
        ({'kind': 'arithmetic', 'bits_per_token': 9, 'precision': 14}, 'bits_per_token 9'),
        ({'kind': 'arithmetic', 'bits_per_token': 8, 'precision': 'x'}, "precision 'x'"),
    ],
)
def test_bad_folders_are_refused(tmp_path, fields, message):
    ArithmeticTokenizer(NGRAM).save(tmp_path)
    tokenizer.write_kind(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        ArithmeticTokenizer.load(tmp_path)


def test_missing_ngram_is_named(tmp_path):
    tokenizer.write_kind(tmp_path, 'arithmetic', bits_per_token=8, precision=14)
    with pytest.raises(FileNotFoundError, match='ngram'):
        ArithmeticTokenizer.load(tmp_path)
