"""Bytes are their own ids."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenization.tokenizer import write_kind
from tokenization.vocabularies.byte import ByteTokenizer, check_ids


@given(st.binary())
def test_decode_inverts_encode(data):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(data)
    assert ids.dtype == np.int32 and ids.shape == (len(data),)
    assert tokenizer.decode(ids) == data
    assert b''.join(tokenizer.token_bytes(i) for i in ids) == data


def test_encode_returns_the_values():
    np.testing.assert_array_equal(ByteTokenizer().encode(b'\x00a\xff'), [0, 97, 255])


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.int64])
def test_decode_takes_any_integers(dtype):
    assert ByteTokenizer().decode(np.array([97, 98], dtype)) == b'ab'


def test_ids_out_of_range_are_named():
    for bad in (256, -1):
        with pytest.raises(ValueError, match=f'id {bad} at position 1 is out of range'):
            ByteTokenizer().decode(np.array([0, bad]))
        with pytest.raises(ValueError, match=f'id {bad} '):
            ByteTokenizer().token_bytes(bad)
    with pytest.raises(ValueError, match='vector of integer ids, got float64'):
        check_ids(np.array([0.5]), 256)
    with pytest.raises(ValueError, match=r'shape \(1, 1\)'):
        check_ids(np.array([[1]]), 256)
    assert ByteTokenizer().decode(np.array([])) == b''


def test_save_and_load(tmp_path):
    ByteTokenizer().save(tmp_path / 'byte')
    assert ByteTokenizer.load(tmp_path / 'byte') == ByteTokenizer()
    write_kind(tmp_path / 'other', 'bpe')
    with pytest.raises(ValueError, match="kind 'bpe', expected"):
        ByteTokenizer.load(tmp_path / 'other')
