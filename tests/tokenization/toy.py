"""Next-byte models small enough to check by hand: one of integers, one of floats."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from tokenization.coding import cdf
from tokenization.coding.next_byte import SYMBOLS, NextByteModel

_START = SYMBOLS  # the row of the table for a row that has read nothing
_WIDTH = 8


def table_model(
    seed: int = 0, precision: int = 14, context: int = 2**30, concentration: float = 0.05
) -> NextByteModel:
    """Order 1: a fixed random table of CDFs, one per previous byte; integers only.

    The state is the last byte, int32[B], and so is the mark.
    """
    rng = np.random.default_rng(seed)
    p_JV = rng.dirichlet(np.full(SYMBOLS, concentration), size=SYMBOLS + 1)
    table_JV = jnp.asarray(cdf.quantize(p_JV, precision))
    return NextByteModel(
        start=lambda batch: jnp.full(batch, _START, jnp.int32),
        cdf=lambda last_B: table_JV[last_B],
        step=lambda last_B, byte_B: byte_B.astype(jnp.int32),
        mark=lambda last_B: last_B,
        rewind=lambda last_B, mark_B: mark_B,
        precision=precision,
        context=context,
        digest=_digest('table', seed, precision, context, concentration),
    )


def float_model(seed: int = 0, precision: int = 14, context: int = 2**30) -> NextByteModel:
    """A recurrent net, h <- tanh(h A + E[byte]), logits h U: its sums depend on their order.

    The state is {'h': float32[B, D], 'read': int32[B]}, `read` the bytes since the last reset.
    """
    rng = np.random.default_rng(seed)
    a_DD = jnp.asarray(rng.normal(size=(_WIDTH, _WIDTH)), jnp.float32)
    e_VD = jnp.asarray(rng.normal(size=(SYMBOLS, _WIDTH)), jnp.float32)
    u_DV = jnp.asarray(rng.normal(size=(_WIDTH, SYMBOLS)) * 2, jnp.float32)

    def start(batch: int) -> dict[str, jax.Array]:
        return {'h': jnp.zeros((batch, _WIDTH)), 'read': jnp.zeros(batch, jnp.int32)}

    def step(state: dict[str, jax.Array], byte_B: jax.Array) -> dict[str, jax.Array]:
        h_BD = jnp.tanh(state['h'] @ a_DD + e_VD[byte_B])
        # A row that reads past its context gives nonsense, so that a missed reset shows.
        late_B = state['read'] >= context
        return {'h': jnp.where(late_B[:, None], jnp.nan, h_BD), 'read': state['read'] + 1}

    return NextByteModel(
        start=start,
        cdf=lambda state: cdf.logits_to_cdf(state['h'] @ u_DV, precision),
        step=step,
        mark=lambda state: state,
        rewind=lambda state, mark: mark,
        precision=precision,
        context=context,
        digest=_digest('float', seed, precision, context),
    )


def sample(model: NextByteModel, length: int, seed: int = 0) -> bytes:
    """Returns `length` bytes drawn from the model, for text that it can compress."""
    rng = np.random.default_rng(seed)
    cdf_of, step = jax.jit(model.cdf), jax.jit(model.step)
    state, text = model.start(1), bytearray()
    for _ in range(length):
        cdf_V = np.asarray(cdf_of(state))[0]
        draw = rng.integers(2**model.precision)
        text.append(int(np.searchsorted(cdf_V, draw, side='right')) - 1)
        state = step(state, jnp.array(text[-1:], jnp.int32))
    return bytes(text)


def _digest(*fields: object) -> str:
    return hashlib.sha256(repr(fields).encode()).hexdigest()
