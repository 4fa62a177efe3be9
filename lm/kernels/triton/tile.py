"""Shared by the Triton kernels: sizes, partial tiles, loops over live blocks, the running softmax.

A kernel gets, per block of queries, the range of key blocks that it has to visit (`ranges`), and
visits no other.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lm.kernels.blocks import SHARED, BlockSizes, check
from lm.kernels.mask import first_run, span

LOG2E = math.log2(math.e)  # logits are kept in base 2, in which GPUs have their exponential
LOWEST = -1e30  # below any logit and still finite: -inf minus -inf is NaN


def padded(n: int) -> int:
    """Returns the side of a tile that holds n: a power of two, at least 16."""
    return max(16, 1 << (n - 1).bit_length())


def f32_sizes(head: int) -> BlockSizes:
    """Returns block sizes for f32 operands: without tensor cores, larger tiles spill registers."""
    if head <= 64:
        return BlockSizes(query=32, key=32, warps=8, stages=1)
    return BlockSizes(query=16, key=16, warps=4 if head <= 128 else 8, stages=1)


def check_sizes(kernel: str, sizes: BlockSizes, needed: int) -> None:
    """Refuses sizes that Triton cannot cut or that overflow a multiprocessor's shared memory.

    Args:
      kernel: its name, for the message.
      sizes: block sizes.
      needed: bytes of shared memory.

    Raises:
      ValueError: in one line, before anything is compiled.
    """
    for field, least in (('query', 16), ('key', 16), ('warps', 1)):
        value = getattr(sizes, field)
        if value < least or value & (value - 1):
            raise ValueError(
                f'{kernel}: BlockSizes.{field}: {value}; Triton wants a power of two of at least '
                f'{least}'
            )
    work = f'blocks of {sizes.query} rows of queries and {sizes.key} keys in {sizes.stages} stages'
    advice = 'lower query, key or stages of BlockSizes'
    check(kernel, work, 'shared memory', needed, SHARED, advice)


def check_operands(kernel: str, *arrays: jax.Array) -> None:
    """Raises ValueError unless the operands of the matrix products are of one dtype."""
    names = [str(x.dtype) for x in arrays]
    if len(set(names)) > 1:
        raise ValueError(f'{kernel}: q, k and v are {", ".join(names)}; expected one dtype for all')


def whole(tree: Any) -> Any:
    """Returns the specification of arrays that a kernel sees in full."""
    return jax.tree.map(lambda _: pl.BlockSpec(), tree)


def ranges(some: jax.Array, every: jax.Array) -> jax.Array:
    """Returns int32 `[..., 4]`: first and end of the live blocks, and of those without a mask.

    The order is (first, first without mask, end without mask, end); see `loop`.
    """
    live = span(some)
    first, end = live[..., :1], live[..., 1:]
    free = jnp.clip(first_run(every & some), first, end)
    return jnp.concatenate([first, free, end], axis=-1)


def load_range(ref, batch, head, block) -> tuple[jax.Array, ...]:
    """Loads the four numbers of `ranges` `[B, K or 1, blocks, 4]` for one block."""
    head = jnp.minimum(head, ref.shape[1] - 1)  # one range for all, or one each
    return tuple(ref[batch, head, block, i] for i in range(4))


def loop(bounds, body, carry, turns: int | None = None):
    """Runs `carry = body(block, masked, carry, turn)` over a range of blocks, once for each turn.

    The blocks that need a mask, on both sides of those that need none, share one loop, so that the
    body is compiled twice and not three times. All turns share it too: one long pipeline of loads.
    """
    first, free, free_end, end = bounds
    before = free - first

    def run(count, block, masked, carry):
        def step(i, carry):
            if turns is None:
                return body(block(i), masked, carry, None)
            turn = jax.lax.div(i, count)
            return body(block(i - turn * count), masked, carry, turn)

        return jax.lax.fori_loop(0, count * (turns or 1), step, carry)

    def around(i):
        return first + i + jnp.where(i < before, 0, free_end - free)

    carry = run(before + end - free_end, around, True, carry)
    return run(free_end - free, lambda i: free + i, False, carry)


def load_rows(ref, index: tuple, columns: int, rows: jax.Array | None = None) -> jax.Array:
    """Loads the tile `ref[index]`, whose last axis is in full.

    Args:
      ref: last axis padded to a tile.
      index: of the axes before the last.
      columns: true length of the last axis; the padding is zero.
      rows: bool, which rows to load; the others are zero.
    """
    width = ref.shape[-1]
    mask = None if rows is None else rows[:, None]
    if columns < width:
        true = (jnp.arange(width) < columns)[None, :]
        mask = true if mask is None else mask & true
    view = ref.at[(*index, slice(None))]
    return plgpu.load(view) if mask is None else plgpu.load(view, mask=mask, other=0.0)


def store_rows(ref, tile: jax.Array, columns: int, rows: jax.Array) -> None:
    """Stores the true rows and columns of a tile."""
    true = rows[:, None] & (jnp.arange(tile.shape[1]) < columns)[None, :]
    plgpu.store(ref, tile.astype(ref.dtype), mask=true)


def dot(a: jax.Array, b: jax.Array, *, trans_a: bool = False, trans_b: bool = False) -> jax.Array:
    """Returns the f32 product of two tiles; f32 operands are not rounded to TF32."""
    highest = jax.lax.Precision.HIGHEST
    return plgpu.dot(a, b, trans_a=trans_a, trans_b=trans_b, precision=highest)


class Softmax(NamedTuple):
    """A softmax under way over the keys seen so far (Milakov and Gimelshein 2018).

    Attributes:
      out: f32 `[rows, C]`, sum of weight times value, relative to `highest`.
      highest: f32 `[rows]`, the greatest logit, in base 2.
      total: f32 `[rows]`, sum of the weights.
    """

    out: jax.Array
    highest: jax.Array
    total: jax.Array

    @staticmethod
    def start(rows: int, columns: int) -> 'Softmax':
        """Returns the state before any key."""
        return Softmax(
            jnp.zeros((rows, columns), jnp.float32),
            jnp.full((rows,), LOWEST, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
        )

    def add(self, s: jax.Array, v: jax.Array) -> 'Softmax':
        """Adds keys with logits `s` in base 2, -inf for unseen ones, and values `v`."""
        highest = jnp.maximum(self.highest, jnp.max(s, axis=1))
        kept = jnp.exp2(self.highest - highest)
        weight = jnp.exp2(s - highest[:, None])
        out = self.out * kept[:, None] + dot(weight.astype(v.dtype), v)
        return Softmax(out, highest, self.total * kept + jnp.sum(weight, axis=1))

    def finish(self) -> tuple[jax.Array, jax.Array]:
        """Returns the mean of the values and the LSE; zeros and -inf where no key was seen."""
        some = jnp.where(self.total > 0, self.total, 1.0)
        lse = (self.highest + jnp.log2(some)) / LOG2E
        return self.out / some[:, None], jnp.where(self.total > 0, lse, -jnp.inf)
