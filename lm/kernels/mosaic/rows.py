"""Query heads folded into rows: shared by `tree`, `column_sums` and `sparse_decode`.

All G query heads that read one KV head become rows of one matrix, so that K and V are fetched
once per KV head. Row `l G + g` is query l, head g of the group. Inside a kernel:

    R rows of a block of queries      S keys of a block      I int32 fields of a row

The data of a row's mask comes as I int32 fields (`fields`), packed along the lanes, and is turned
upright in the kernel: an int32 column `[R, 1]` in HBM would be padded to 128 lanes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lm.kernels.mask import WORD, Mask
from lm.kernels.mosaic.tile import LANES, bytes_of, dot, round_up

KEY_BYTES = 2**19  # of K per block: a transfer long enough to hide the cost of a grid step
LOGIT_BYTES = 2**20  # of f32 logits per block: more takes long to compile
HIDDEN = -0.7 * float(np.finfo(np.float32).max)  # finite: -inf - -inf would be NaN


class Keys(NamedTuple):
    """int32 `[1, S]` of a block of keys; segments where the mask has them."""

    position: Any
    segment: Any = None


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Which conditions a mask has, and so which of them the kernel's code tests.

    Attributes:
      causal, window, segment: as in `Mask`.
      nodes: of the draft tree, the last rows in use; 0 where no ancestors are given.
    """

    causal: bool
    window: bool
    segment: bool
    nodes: int


def conditions(mask: Mask) -> Conditions:
    """Returns the conditions of a mask."""
    segment = mask.query_segment is not None and mask.key_segment is not None
    nodes = 0 if mask.ancestors is None else mask.tree_nodes
    return Conditions(mask.causal, mask.window is not None, segment, nodes)


def one_dtype(kernel: str, **arrays: jax.Array) -> None:
    """Raises ValueError where dtypes differ."""
    if len({x.dtype for x in arrays.values()}) > 1:
        found = ', '.join(f'{name} {x.dtype}' for name, x in arrays.items())
        raise ValueError(f'{kernel}: {found}; expected one dtype')


def default_keys(n_rows: int, channels: int, dtype) -> int:
    """Returns the default keys per block beside that many rows."""
    fetched = KEY_BYTES // cache_bytes(LANES, channels, dtype)
    computed = LOGIT_BYTES // bytes_of((n_rows, LANES), jnp.float32)
    return max(1, min(fetched, computed)) * LANES


def key_block(kernel: str, key: int, keys: int) -> int:
    """Returns the keys per block: `key`, or fewer where a cache has fewer.

    Raises:
      ValueError: `key` is no multiple of 128, the lanes of a vector register.
    """
    if key % LANES:
        raise ValueError(f'{kernel}: BlockSizes.key: {key}; expected a multiple of {LANES}')
    return min(key, round_up(keys, LANES))


def fold(x_BLHC: jax.Array, kv_heads: int, rows: int, padding: float = 0.0) -> jax.Array:
    """Returns `[B, K, rows, C]`: the query heads of each KV head, padded at the end."""
    b, l, h, c = x_BLHC.shape
    x_BLKGC = x_BLHC.reshape(b, l, kv_heads, h // kv_heads, c)
    x_BKRC = jnp.moveaxis(x_BLKGC, 1, 2).reshape(b, kv_heads, l * h // kv_heads, c)
    pad = ((0, 0), (0, 0), (0, rows - x_BKRC.shape[2]), (0, 0))
    return jnp.pad(x_BKRC, pad, constant_values=padding)


def unfold(x_BKRC: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Inverts `fold`: returns `shape`, `[B, L, H, C]`."""
    b, l, h, c = shape
    k = x_BKRC.shape[1]
    x_BKLGC = x_BKRC[:, :, : l * h // k].reshape(b, k, l, h // k, c)
    return jnp.moveaxis(x_BKLGC, 2, 1).reshape(shape)


def innermost(cache: jax.Array) -> jax.Array:
    """Returns caches `[N, B, K, S, C]` as they are, or as `[N, B, K, C, S]`.

    XLA lays out a cache whose channels would leave lanes empty with S innermost. A kernel that
    asked for the other order would get a copy of it, twice the size for 64 channels.
    """
    return cache if fill_lanes(cache.shape[-1]) else cache.swapaxes(3, 4)


def fill_lanes(channels: int) -> bool:
    """Whether caches with this many channels are read as `[S, C]`; else as `[C, S]`."""
    return channels % LANES == 0


def cache_bytes(key: int, channels: int, dtype) -> int:
    """Returns the bytes of a block of K or V in vector memory."""
    return bytes_of((key, channels) if fill_lanes(channels) else (channels, key), dtype)


def cache_spec(key: int, channels: int, at: Callable) -> pl.BlockSpec:
    """Returns the spec of `innermost` caches; `at` gives layer, batch, KV head, block of keys."""
    if fill_lanes(channels):
        return pl.BlockSpec((None, None, None, key, channels), lambda *i: (*at(*i), 0))

    def turned(*i):
        layer, b, h, block = at(*i)
        return layer, b, h, 0, block

    return pl.BlockSpec((None, None, None, channels, key), turned)


def fields(mask: Mask, group: int, rows: int) -> jax.Array:
    """Returns int32 `[B, I, rows]`: each row's position, its segment, its words of ancestors."""
    segment = mask.query_segment if conditions(mask).segment else None
    columns = [x[..., None] for x in (mask.query_position, segment) if x is not None]
    words = [] if mask.ancestors is None else [mask.ancestors]
    fields_BLI = jnp.concatenate(columns + words, axis=-1)
    fields_BIR = jnp.repeat(fields_BLI, group, axis=1).swapaxes(1, 2)
    return jnp.pad(fields_BIR, ((0, 0), (0, 0), (0, rows - fields_BIR.shape[2])))


def fields_bytes(n_fields: int, n_rows: int) -> int:
    """Returns the bytes of `n_rows` rows' fields in vector memory.

    They come packed, twice for the next ones are on their way; are turned upright; and each column
    of those takes a tile's width of its own while the mask is made.
    """
    lanes = round_up(n_rows, LANES)
    packed, turned = bytes_of((n_fields, lanes), jnp.int32), bytes_of((lanes, n_fields), jnp.int32)
    return 2 * packed + 2 * turned + n_fields * bytes_of((n_rows, 1), jnp.int32)


def keys(mask: Mask) -> Keys:
    """Returns positions `[B, K or 1, 1, S]` and segments `[B, 1, S]` of the keys."""
    segment = mask.key_segment if conditions(mask).segment else None
    return Keys(mask.key_position[:, :, None], None if segment is None else segment[:, None])


def scalars(mask: Mask) -> tuple[jax.Array, jax.Array]:
    """Returns int32 window `[1]` and rows in use `[B]`, for scalar memory."""
    batch, rows = mask.query_position.shape[0], mask.key_position.shape[-1]
    length_B = jnp.full((batch,), rows) if mask.length is None else mask.length
    window = 0 if mask.window is None else mask.window
    return number(window), jnp.minimum(length_B, rows).astype(jnp.int32)


def mask_row(b, h, key_heads: int):
    """Which row of a mask's bounds is a batch row's and KV head's; one may serve all heads."""
    return b * key_heads + (h if key_heads > 1 else 0)


def number(n: jax.Array | int) -> jax.Array:
    """Returns int32 `[1]`."""
    return jnp.asarray(n, jnp.int32).reshape(1)


def upright(x_IR: jax.Array) -> jax.Array:
    """In a kernel: `[I, R]` of 32 bits, R a multiple of 128, to `[R, I]`."""
    i, r = x_IR.shape
    x_IR = jnp.broadcast_to(x_IR, (8, r)) if i == 1 else x_IR
    return x_IR.T[:, :i]


def flat(x_R1: jax.Array) -> jax.Array:
    """In a kernel: `[R, 1]` of f32 to `[1, R]`."""
    return jnp.broadcast_to(x_R1, (x_R1.shape[0], LANES)).T[:1]


def holds(position_1S: jax.Array, first, length) -> jax.Array:
    """In a kernel: which keys of a block that starts at row `first` are keys, bool `[1, S]`."""
    return (position_1S >= 0) & (_row(position_1S, first) < length)


def _row(x_1S, first):
    return first + jax.lax.broadcasted_iota(jnp.int32, x_1S.shape, 1)


def seen(given: Conditions, fields_RI, keys: Keys, first, length, window) -> jax.Array:
    """In a kernel: which keys of a block each row sees, bool `[R, S]`; `visible` of a block.

    Args:
      given: the mask's conditions.
      fields_RI: as from `fields`, upright.
      keys: of the block.
      first: the block's first row of the cache.
      length, window: scalars.
    """
    row_1S = _row(keys.position, first)
    position_R1 = fields_RI[:, :1]
    held_1S = holds(keys.position, first, length)
    result = jnp.broadcast_to(held_1S, (fields_RI.shape[0], held_1S.shape[1]))
    if given.causal:
        result &= keys.position <= position_R1
    if given.window:
        result &= position_R1 - keys.position < window
    if given.segment:
        result &= fields_RI[:, 1:2] == keys.segment
    if given.nodes:
        node_1S = row_1S - (length - given.nodes)
        words_RW = fields_RI[:, 1 + given.segment :]
        word_RS = words_RW[:, :1]
        for w in range(1, words_RW.shape[1]):
            word_RS = jnp.where(node_1S >= w * WORD, words_RW[:, w : w + 1], word_RS)
        bit_RS = (word_RS >> (node_1S & (WORD - 1))) & 1
        result &= (node_1S < 0) | (bit_RS == 1)
    return result


def products(q_RC, k) -> jax.Array:
    """In a kernel: q . k, f32 `[R, S]`; k is `[S, C]` or `[C, S]`, as it was read."""
    return dot(q_RC, k, (1, 1) if fill_lanes(q_RC.shape[1]) else (1, 0))


def blank(v, held_1S: jax.Array, channels: int) -> jax.Array:
    """In a kernel: v with zeros where no key is held, for a weight of 0 times NaN is NaN."""
    if fill_lanes(channels):
        held_S1 = upright(held_1S.astype(jnp.int32)) == 1
        return jnp.where(held_S1, v, 0)
    return jnp.where(held_1S, v, 0)


class Softmax(NamedTuple):
    """An online softmax in vector memory: greatest logit `[R, 1]`, sum `[R, 1]`, `[R, C]`."""

    highest: Any
    total: Any
    values: Any

    @classmethod
    def scratch(cls, rows: int, channels: int) -> 'Softmax':
        """Returns the memory to ask for."""
        column = pltpu.VMEM((rows, 1), jnp.float32)
        return cls(column, column, pltpu.VMEM((rows, channels), jnp.float32))

    def start(self) -> None:
        """Empties it."""
        self.highest[...] = jnp.full_like(self.highest, HIDDEN)
        self.total[...] = jnp.zeros_like(self.total)
        self.values[...] = jnp.zeros_like(self.values)

    def add(self, s_RS: jax.Array, v: jax.Array) -> None:
        """Adds a block of keys; hidden logits are `HIDDEN`, and all of v is finite.

        Sums from before a row's first visible key are wiped out by that key, since
        exp(HIDDEN - logit) is 0; a row that never sees one is known by its greatest logit.
        """
        before_R1 = self.highest[...]
        highest_R1 = jnp.maximum(before_R1, jnp.max(s_RS, axis=1, keepdims=True))
        weights_RS = jnp.exp(s_RS - highest_R1)
        decay_R1 = jnp.exp(before_R1 - highest_R1)
        self.highest[...] = highest_R1
        self.total[...] = decay_R1 * self.total[...] + jnp.sum(weights_RS, axis=1, keepdims=True)
        over_keys = (1, 0) if fill_lanes(self.values.shape[1]) else (1, 1)
        values_RC = dot(weights_RS.astype(v.dtype), v, over_keys)
        self.values[...] = decay_R1 * self.values[...] + values_RC

    def finish(self) -> tuple[jax.Array, jax.Array]:
        """Returns f32 `[R, C]`, the weighted mean of the values, and the LSE, `[R, 1]`."""
        some_R1 = self.highest[...] > HIDDEN
        total_R1 = jnp.where(some_R1, self.total[...], 1.0)
        lse_R1 = jnp.where(some_R1, self.highest[...] + jnp.log(total_R1), -jnp.inf)
        return jnp.where(some_R1, self.values[...] / total_R1, 0.0), lse_R1
