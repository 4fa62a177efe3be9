"""A byte transformer as a `NextByteModel`: the M1 of Lester et al. (TMLR 12/2024)."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from lm.checkpoints import bundle
from lm.model import cache as cache_lib
from lm.model import transformer
from lm.model.cache import Cache
from lm.model.config import Config
from lm.model.params import Params
from tokenization.coding import cdf as cdf_lib
from tokenization.coding.next_byte import SYMBOLS, NextByteModel

BOS = SYMBOLS


@flax.struct.dataclass
class State:
    """The cache of B rows, the CDF of their next byte, and the parameters.

    The parameters are part of the state so that jitted functions get them as arguments, not as
    constants compiled into the program.
    """

    params: Params
    cache: Cache
    cdf_BV: jax.Array


def model(params: Params, config: Config, context: int, precision: int = 14) -> NextByteModel:
    """Returns the transformer as a next-byte model; a mark is (rows in the cache, CDF).

    The first byte is predicted from the input-only id `BOS`. Frequencies are integers computed from
    float logits, so they are reproducible only on one machine, at one batch size and through one
    compiled program; see `tokenization.coding.next_byte`.

    Args:
      params: of a model over 256 bytes and BOS; further ids are never predicted.
      config: its config.
      context: the greatest number of bytes read after a reset; sets the size of the cache.
      precision: bits of the CDF.

    Raises:
      ValueError: the vocabulary has no BOS, or the context exceeds the model's.
    """
    if config.vocab_size <= BOS:
        raise ValueError(f'vocab_size {config.vocab_size}: a byte model needs {BOS + 1} or more')
    if not 1 <= context < config.max_length:
        raise ValueError(
            f'context {context}: expected 1 to {config.max_length - 1} bytes (the model was made '
            f'for {config.max_length} positions, BOS included)'
        )

    def read(state: State, token_B: jax.Array) -> State:
        logits, cache = transformer.step(state.params, config, token_B[:, None], state.cache)
        cdf_BV = cdf_lib.logits_to_cdf(logits[:, 0, :SYMBOLS], precision)
        return dataclasses.replace(state, cache=cache, cdf_BV=cdf_BV)

    def start(batch: int) -> State:
        empty = cache_lib.init(config, batch, context + 1)
        unread = State(params, empty, jnp.zeros((batch, SYMBOLS + 1), jnp.int32))
        return read(unread, jnp.full((batch,), BOS, jnp.int32))

    def mark(state: State) -> tuple[jax.Array, jax.Array]:
        return state.cache.length_B, state.cdf_BV

    def rewind(state: State, mark: tuple[jax.Array, jax.Array]) -> State:
        cache = dataclasses.replace(state.cache, length_B=mark[0])
        return dataclasses.replace(state, cache=cache, cdf_BV=mark[1])

    return NextByteModel(
        start, lambda state: state.cdf_BV, read, mark, rewind, precision, context,
        bundle.digest(config, params),
    )  # fmt: skip
