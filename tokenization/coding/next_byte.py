"""The contract of a next-byte model: a tuple of pure functions.

The arithmetic coder, Equal-Info windows and compiled tables know a model only by this. A byte
n-gram (`tokenization.coding.ngram`) and a transformer (`tokenization.coding.neural`) implement it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

SYMBOLS = 256

State = Any
Mark = Any


class NextByteModel(NamedTuple):
    """The distribution of the next byte, in integers, for a batch of B independent rows.

    Encoder and decoder must see the same integers, so both must call the same functions at the
    same batch size: results may depend on B, through the order of float sums on the device, but
    never on the contents of other rows.

    Attributes:
      start: `batch -> state`: B rows that have read nothing.
      cdf: `state -> int32[B, 257]`: cumulative frequencies of the next byte, strictly
        increasing, from 0 to `2**precision`.
      step: `(state, byte: int32[B]) -> state` after reading one byte per row.
      mark: `state -> mark`: a small pytree (leading axis B) that remembers this position.
      rewind: `(state, mark) -> state`: returns to a mark taken earlier on the same rows. Marks of
        different positions may be mixed row by row with `jnp.where`; `mark(start(B))` resets.
      precision: bits of the CDF, at most 16.
      context: the greatest number of bytes that a row may read after its last reset; the caller
        must not exceed it.
      digest: hex SHA-256 of the model. Models of equal digests give equal integers on one machine.
    """

    start: Callable[[int], State]
    cdf: Callable[[State], jax.Array]
    step: Callable[[State, jax.Array], State]
    mark: Callable[[State], Mark]
    rewind: Callable[[State, Mark], State]
    precision: int
    context: int
    digest: str
