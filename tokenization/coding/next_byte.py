"""A next-byte model as a tuple of pure functions, the one thing that coders know of a model.

The arithmetic coder, the Equal-Info windows and the compiled codecs all read their
probabilities from a `NextByteModel`; a byte n-gram (`tokenization.coding.ngram`) and a transformer
(`tokenization.coding.neural`) are two of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

SYMBOLS = 256

State = Any
Mark = Any


class NextByteModel(NamedTuple):
    """Probabilities of the next byte, as integers, for a batch of B independent rows.

    Encoder and decoder must see the same integers, so both call the same functions at the
    same batch size: results may depend on B through the order of float sums on the device,
    never on the contents of the other rows.

    Attributes:
      start: `batch -> state`: B rows that have read nothing.
      cdf: `state -> int32[B, 257]`: cumulative frequencies of the next byte, strictly
        increasing, from 0 to `2**precision`.
      step: `(state, byte: int32[B]) -> state` after reading one byte per row.
      mark: `state -> mark`: a small pytree (leading axis B) to come back to this point of the
        row's own history.
      rewind: `(state, mark) -> state`: back to a mark taken earlier on the same rows. Marks of
        different points may be mixed row by row with `jnp.where`; `mark(start(B))` resets.
      precision: bits of the CDF, at most 16.
      context: bytes a row may read after its last reset; a longer row is an error of the caller.
      digest: hex SHA-256 that names the model: equal digests give equal integers on one machine.
    """

    start: Callable[[int], State]
    cdf: Callable[[State], jax.Array]
    step: Callable[[State, jax.Array], State]
    mark: Callable[[State], Mark]
    rewind: Callable[[State, Mark], State]
    precision: int
    context: int
    digest: str
