"""A byte transformer as a `NextByteModel`: the M1 of Lester et al. (TMLR 12/2024)."""

import flax.struct
import jax
import jax.numpy as jnp

from lm.checkpoints import bundle
from lm.model import contract, stepped
from lm.model.config import Config
from lm.model.contract import Memory, Seen
from lm.model.params import Params
from tokenization.coding import cdf as cdf_lib
from tokenization.coding.next_byte import SYMBOLS, NextByteModel

BOS = SYMBOLS


@flax.struct.dataclass
class State:
    """The bytes that B rows have read, the distribution of the next, and the parameters.

    The parameters are part of the state so that jitted functions get them as arguments, not as
    constants compiled into the program.

    Attributes:
      params: of the model.
      memory: see `lm.model.contract`.
      read_B: int32, symbols read since the start, BOS included.
      cdf_BV: of the next byte.
    """

    params: Params
    memory: Memory
    read_B: jax.Array
    cdf_BV: jax.Array


def model(params: Params, config: Config, context: int, precision: int = 14) -> NextByteModel:
    """Returns the transformer as a next-byte model; a mark is (symbols read, CDF).

    The first byte is predicted from the input-only id `BOS`. Frequencies are integers computed from
    float logits, so they are reproducible only on one machine, at one batch size and through one
    compiled program; see `tokenization.coding.next_byte`.

    Args:
      params: of a model over 256 bytes and BOS; further ids are never predicted.
      config: its config.
      context: the greatest number of bytes read after a reset; sets the size of the cache.
      precision: bits of the CDF.

    Raises:
      ValueError: the vocabulary has no BOS, the context exceeds the model's, or the model draws
        its tables.
    """
    if config.vocab_size <= BOS:
        raise ValueError(f'vocab_size {config.vocab_size}: a byte model needs {BOS + 1} or more')
    if not 1 <= context < config.max_length:
        raise ValueError(
            f'context {context}: expected 1 to {config.max_length - 1} bytes (the model was made '
            f'for {config.max_length} positions, BOS included)'
        )
    if not config.learned_tables:
        raise ValueError('config: a model whose tables are drawn; a coder needs learned ones')

    lm = stepped.model(config)

    def after(params: Params, memory: Memory, seen: Seen, read_B: jax.Array) -> State:
        logits_B1V = lm.head(params, memory, seen.h_BTD)
        cdf_BV = cdf_lib.logits_to_cdf(logits_B1V[:, 0, :SYMBOLS], precision)
        return State(params, memory, read_B, cdf_BV)

    def read(state: State, token_B: jax.Array) -> State:
        nodes = contract.chain(token_B[:, None], state.read_B)
        return after(state.params, *lm.step(state.params, state.memory, nodes), state.read_B + 1)

    def start(batch: int) -> State:
        bos_B1, one_B = jnp.full((batch, 1), BOS, jnp.int32), jnp.ones(batch, jnp.int32)
        keys = jax.random.split(jax.random.key(0), batch)  # learned tables need none
        prompt = contract.chain(bos_B1)
        return after(params, *lm.start(params, prompt, one_B, context + 1, keys), one_B)

    def mark(state: State) -> tuple[jax.Array, jax.Array]:
        return state.read_B, state.cdf_BV

    def rewind(state: State, mark: tuple[jax.Array, jax.Array]) -> State:
        memory = lm.keep(state.memory, None, mark[0], since_B=0)
        return State(state.params, memory, *mark)

    return NextByteModel(
        start, lambda state: state.cdf_BV, read, mark, rewind, precision, context,
        bundle.digest(config, params),
    )  # fmt: skip
