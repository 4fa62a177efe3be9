"""New tokens in pieces of an old vocabulary: what a hypernetwork reads of a token.

Source: Minixhofer et al., Zero-Shot Tokenizer Transfer (NeurIPS 2024, arXiv:2405.07883), section 3.
"""

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from tokenization.tokenizer import Tokenizer

PADDING = -1


class PieceTokenizer(Tokenizer, Protocol):
    """A tokenizer that also takes a string whole, without splitting it into words first."""

    def encode_piece(self, data: bytes) -> list[int]:
        """Returns the ids of `data` taken as one word.

        A byte that the trained vocabulary lacks is `vocab_size` + byte; such an id decodes to
        nothing, it only says which byte it was.
        """
        ...


def decompose(source: PieceTokenizer, tokens: Iterable[bytes], length: int = 7) -> np.ndarray:
    """Returns the pieces of each token, int32 `[V, length]`, padded with -1.

    Ids from `source.vocab_size` on are bytes without a row in the source's table: vocab_size +
    byte, so that a table of fallback rows needs 256. An empty token (a special one) is a row of
    padding. Like the paper's, pieces beyond `length` are dropped: long tokens that begin with
    the same pieces get equal rows.

    Args:
      source: splits the tokens.
      tokens: V byte strings, any bytes.
      length: most pieces of a token.

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
