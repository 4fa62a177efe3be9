"""Tokens in pieces of another vocabulary."""

import numpy as np
import pytest

from tokenization.transfer.decompose import decompose
from tokenization.vocabularies.bpe import BPETokenizer
from tokenization.vocabularies.byte import ByteTokenizer

BYTES = tuple(bytes([byte]) for byte in range(256))


def test_padded_truncated_and_empty():
    pieces_VP = decompose(ByteTokenizer(), [b'', b'ab', b'abcdefgh', b'\xff'], length=7)
    assert pieces_VP.dtype == np.int32 and pieces_VP.shape == (4, 7)
    assert pieces_VP.tolist() == [
        [-1] * 7, [97, 98] + [-1] * 5, [97, 98, 99, 100, 101, 102, 103], [255] + [-1] * 6
    ]  # fmt: skip
    assert decompose(ByteTokenizer(), []).shape == (0, 7)
    with pytest.raises(ValueError, match='length 0'):
        decompose(ByteTokenizer(), [b'a'], length=0)


def test_a_piece_is_merged_across_words():
    # The pattern splits between `b` and the space; a token of another vocabulary is one piece.
    source = BPETokenizer((*BYTES, b'ab', b' c', b'ab c'))
    assert source.encode(b'ab c').tolist() == [256, 257]
    assert decompose(source, [b'ab c', b' cab'], 3).tolist() == [[258, -1, -1], [257, 256, -1]]


def test_own_tokens_are_single_pieces():
    source = BPETokenizer.train([b'one two three two one two'] * 9, 280)
    pieces_VP = decompose(source, source.tokens)
    np.testing.assert_array_equal(pieces_VP[:, 0], np.arange(source.vocab_size))
    assert np.all(pieces_VP[:, 1:] == -1)
