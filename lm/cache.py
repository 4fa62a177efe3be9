"""The key/value cache: rows addressed per KV head, each with the position it came from."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from lm.config import Config


@flax.struct.dataclass
class Cache:
    """Keys and values of what a batch has read.

    Attributes:
      k_NBKSC, v_NBKSC: rows; only the first `length_B` of the S rows hold anything.
      position_NBKS: int32: position in the text of each row, negative where there is none; a
        policy may keep different rows for different layers and heads.
      length_B: int32: rows in use, per batch row; also where the next row is written.
    """

    k_NBKSC: jax.Array
    v_NBKSC: jax.Array
    position_NBKS: jax.Array
    length_B: jax.Array


def init(config: Config, batch: int, rows: int) -> Cache:
    """Returns an empty cache with room for `rows` keys per batch row."""
    shape = (config.n_layers, batch, config.n_kv_heads, rows, config.head_dim)
    return Cache(
        k_NBKSC=jnp.zeros(shape, config.dtype),
        v_NBKSC=jnp.zeros(shape, config.dtype),
        position_NBKS=jnp.full(shape[:-1], -1, jnp.int32),
        length_B=jnp.zeros((batch,), jnp.int32),
    )


def write_positions(cache: Cache, positions_BL: jax.Array) -> Cache:
    """Appends L rows: notes their positions and lengthens the cache; `write` fills them.

    Rows past the end of the cache are dropped: the caller allocates enough.
    """
    b, l = positions_BL.shape
    rows_BL = cache.length_B[:, None] + jnp.arange(l)
    batch = jnp.arange(b)[:, None]
    position_NBKS = cache.position_NBKS.at[:, batch, :, rows_BL].set(
        positions_BL[:, :, None, None], mode='drop'
    )
    return dataclasses.replace(cache, position_NBKS=position_NBKS, length_B=cache.length_B + l)


def write(rows_NBKSC: jax.Array, layer: jax.Array | int, start_B: jax.Array, new_BKLC: jax.Array):
    """Returns `rows_NBKSC` with `new_BKLC` written at rows `start_B + [0, L)` of one layer."""
    b, _, l, _ = new_BKLC.shape
    rows_BL = start_B[:, None] + jnp.arange(l)
    batch = jnp.arange(b)[:, None]
    new_BLKC = new_BKLC.swapaxes(1, 2).astype(rows_NBKSC.dtype)
    return rows_NBKSC.at[layer, batch, :, rows_BL].set(new_BLKC, mode='drop')


def keep(cache: Cache, start_B: jax.Array, rows_BM: jax.Array, count_B: jax.Array) -> Cache:
    """Keeps an accepted path: row `start + rows[i]` moves to `start + i`, for i below `count`.

    What lay behind `start + count` is given up. All rows are read before any is written.

    Args:
      cache: its last rows are the nodes of a draft tree.
      start_B: int32, the first node's row.
      rows_BM: int32, nodes of the path, counted from `start_B`; at least `count_B` of them matter.
      count_B: int32, at most M.
    """
    m = rows_BM.shape[1]
    batch = jnp.arange(rows_BM.shape[0])[:, None]
    source = start_B[:, None] + rows_BM
    target = start_B[:, None] + jnp.arange(m)
    target = jnp.where(jnp.arange(m) < count_B[:, None], target, cache.position_NBKS.shape[-1])

    def move(rows):
        return rows.at[:, batch, :, target].set(rows[:, batch, :, source], mode='drop')

    return Cache(
        move(cache.k_NBKSC), move(cache.v_NBKSC), move(cache.position_NBKS), start_B + count_B
    )


def truncate(cache: Cache, length_B: jax.Array) -> Cache:
    """Returns the cache with only its first `length_B` rows; the rest will be overwritten."""
    return dataclasses.replace(cache, length_B=jnp.minimum(cache.length_B, length_B))


def take(cache: Cache, rows_M: jax.Array) -> Cache:
    """Returns the cache of M batch rows, copies of the given ones."""
    return Cache(
        k_NBKSC=cache.k_NBKSC[:, rows_M],
        v_NBKSC=cache.v_NBKSC[:, rows_M],
        position_NBKS=cache.position_NBKS[:, rows_M],
        length_B=cache.length_B[rows_M],
    )
