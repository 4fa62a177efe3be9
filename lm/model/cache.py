"""The key/value cache: rows addressed per KV head, each with its position in the text.

Rows are not positions: a cache that has evicted rows is shorter than its text.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lm.devices import mesh
from lm.model.config import Config


@flax.struct.dataclass
class Cache:
    """Keys and values of the nodes that a batch has read.

    Attributes:
      k_NBKSC, v_NBKSC: S rows; only the first `length_B` are in use.
      position_NBKS: int32: each row's position in the text, negative for rows without a key; a
        policy may keep different rows for different layers and heads.
      length_B: int32: rows in use, per batch row; also where the next row is written.
    """

    k_NBKSC: jax.Array
    v_NBKSC: jax.Array
    position_NBKS: jax.Array
    length_B: jax.Array


def init(config: Config, batch: int, rows: int) -> Cache:
    """Returns an empty cache with room for `rows` keys per batch row, laid out over the mesh."""
    shape = (config.n_layers, batch, config.n_kv_heads, rows, config.head_dim)
    axes = ('layers', 'batch', 'kv_heads', 'length', 'head')
    return Cache(
        k_NBKSC=mesh.constrain(jnp.zeros(shape, config.dtype), axes),
        v_NBKSC=mesh.constrain(jnp.zeros(shape, config.dtype), axes),
        position_NBKS=mesh.constrain(jnp.full(shape[:-1], -1, jnp.int32), axes[:-1]),
        length_B=mesh.constrain(jnp.zeros((batch,), jnp.int32), ('batch',)),
    )


def write_positions(
    cache: Cache, positions_BL: jax.Array, layers: Sequence[int] | None = None
) -> Cache:
    """Appends L rows: records their positions and increases the length; `write` fills them.

    Rows past the end of the cache are dropped: the caller allocates enough.

    Args:
      cache: see `Cache`.
      positions_BL: int32, of the new rows.
      layers: layers that the nodes run; all by default. In other layers the rows hold no key.
    """
    noted = positions_BL[:, None]
    if layers is not None:
        runs_N = np.isin(np.arange(cache.position_NBKS.shape[0]), np.asarray(layers))
        noted = jnp.where(runs_N[:, None, None, None], noted, -1)
    length_B = cache.length_B + positions_BL.shape[1]
    return _note(dataclasses.replace(cache, length_B=length_B), noted, slice(None))


def reveal(cache: Cache, positions_BL: jax.Array, layers: Sequence[int]) -> Cache:
    """Records the positions of the last L rows in further layers, which the nodes run now."""
    return _note(cache, positions_BL[:, None], np.asarray(layers)[:, None, None, None])


def write(rows_NBKSC: jax.Array, layer: jax.Array | int, start_B: jax.Array, new_BKLC: jax.Array):
    """Returns `rows_NBKSC` with `new_BKLC` written at rows `start_B + [0, L)` of one layer."""
    rows_BL = start_B[:, None] + jnp.arange(new_BKLC.shape[2])
    new_BKLC = new_BKLC.astype(rows_NBKSC.dtype)
    return rows_NBKSC.at[(layer, *_rows(rows_BL, new_BKLC.shape[1]))].set(new_BKLC, mode='drop')


def keep(cache: Cache, start_B: jax.Array, rows_BM: jax.Array, count_B: jax.Array) -> Cache:
    """Keeps an accepted path: row `start + rows[i]` moves to `start + i`, for i below `count`.

    Rows from `start + count` on are dropped. All rows are read before any is written.

    Args:
      cache: its last rows are the nodes of a draft tree.
      start_B: int32, the first node's row.
      rows_BM: int32, nodes of the path, relative to `start_B`; the first `count_B` are kept.
      count_B: int32, at most M.
    """
    kv_heads, rows = cache.position_NBKS.shape[2:]
    m = rows_BM.shape[1]
    target_BM = start_B[:, None] + jnp.arange(m)
    target_BM = jnp.where(jnp.arange(m) < count_B[:, None], target_BM, rows)
    source = (slice(None), *_rows(start_B[:, None] + rows_BM, kv_heads))
    target = (slice(None), *_rows(target_BM, kv_heads))

    def move(rows):
        return rows.at[target].set(rows[source], mode='drop')

    return Cache(
        move(cache.k_NBKSC), move(cache.v_NBKSC), move(cache.position_NBKS), start_B + count_B
    )


def truncate(cache: Cache, length_B: jax.Array) -> Cache:
    """Returns the cache truncated to `length_B` rows; later rows will be overwritten."""
    return dataclasses.replace(cache, length_B=jnp.minimum(cache.length_B, length_B))


def take(cache: Cache, rows_M: jax.Array) -> Cache:
    """Returns the cache of M batch rows, copied from the given ones."""
    return Cache(
        k_NBKSC=cache.k_NBKSC[:, rows_M],
        v_NBKSC=cache.v_NBKSC[:, rows_M],
        position_NBKS=cache.position_NBKS[:, rows_M],
        length_B=cache.length_B[rows_M],
    )


def _note(cache: Cache, positions: jax.Array, layers: Any) -> Cache:
    l = positions.shape[-1]
    rows = _rows(cache.length_B[:, None] - l + jnp.arange(l), cache.position_NBKS.shape[2])
    position_NBKS = cache.position_NBKS.at[(layers, *rows)].set(positions, mode='drop')
    return dataclasses.replace(cache, position_NBKS=position_NBKS)


def _rows(rows_BL: jax.Array, kv_heads: int) -> tuple[jax.Array, ...]:
    """Returns indices of rows for the axes B, K and S; they broadcast to `[B, K, L]`.

    Every axis is indexed: with a slice between, XLA scatters in another layout than the TPU kernels
    read, and copies the whole stack on the way in and out.
    """
    b = rows_BL.shape[0]
    return jnp.arange(b)[:, None, None], jnp.arange(kv_heads)[:, None], rows_BL[:, None]
