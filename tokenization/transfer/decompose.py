"""Decomposes new tokens into pieces of the old vocabulary, the input of a hypernetwork.

Source: Minixhofer et al., Zero-Shot Tokenizer Transfer (NeurIPS 2024, arXiv:2405.07883), section 3.
"""

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from tokenization.tokenizer import Tokenizer

PADDING = -1


class PieceTokenizer(Tokenizer, Protocol):
    """A tokenizer that can also encode a string as one pretoken, without splitting it first."""

    def encode_piece(self, data: bytes) -> list[int]:
        """Returns the ids of `data` taken as one pretoken.

        A byte without a token in the trained vocabulary is `vocab_size` + byte. Such an id only
        identifies the byte; it cannot be decoded.
        """
        ...


def decompose(source: PieceTokenizer, tokens: Iterable[bytes], length: int = 7) -> np.ndarray:
    """Returns the pieces of each token, int32 `[V, length]`, padded with -1.

    A byte without a row in the source's table is `source.vocab_size` + byte, so a table of fallback
    rows needs 256. The row of an empty (special) token is all padding. As in the paper, pieces
    beyond `length` are dropped, so long tokens with the same first pieces get equal rows.

    >>> from tokenization.vocabularies.byte import ByteTokenizer
    >>> decompose(ByteTokenizer(), [b'ab', b''], length=3)
    array([[97, 98, -1],
           [-1, -1, -1]], dtype=int32)

    Args:
      source: the tokenizer whose ids are the pieces.
      tokens: V byte strings, any bytes.
      length: the greatest number of pieces per token.

    Raises:
      ValueError: `length` is below 1.
    """
    if length < 1:
        raise ValueError(f'length {length}: expected at least 1 piece per token')
    rows = [source.encode_piece(token)[:length] for token in tokens]
    size_V = np.fromiter(map(len, rows), np.int64, len(rows))
    pieces_VP = np.full((len(rows), length), PADDING, np.int32)
    flat = [piece for row in rows for piece in row]
    pieces_VP[np.arange(length) < size_V[:, None]] = np.array(flat, np.int32)
    return pieces_VP
