"""Shared by the TPU kernels: tiles of vector memory, steps over live blocks, compiler settings.

A value of vector memory fills tiles of 128 lanes and 8 sublanes of 32 bits. A kernel gets, per row
of blocks, the bounds of those that it has to visit (`block_mask.bounds`), and visits no other.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lm.kernels.blocks import SMEM, VMEM

LANES = 128
FEW = 3  # scalars that do not depend on the batch: layer, first batch row, window
BOUNDS = 4  # numbers per row of blocks: live from, live to, whole from, whole to


def round_up(n: int, multiple: int) -> int:
    """Returns the least multiple that is at least n."""
    return -(-n // multiple) * multiple


def sublanes(dtype: jax.typing.DTypeLike) -> int:
    """Returns the rows of a tile: 8 of 32 bits, 16 of 16 bits."""
    return 32 // np.dtype(dtype).itemsize


def bytes_of(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> int:
    """Returns the bytes of an array in vector memory, where its last two axes fill whole tiles."""
    *outer, rows, columns = shape
    padded = round_up(rows, sublanes(dtype)) * round_up(columns, LANES)
    return int(np.prod(outer)) * np.dtype(dtype).itemsize * padded


def compiler_params(*semantics: Literal['parallel', 'arbitrary']) -> pltpu.CompilerParams:
    """Which axes of the grid are sequential, and all the vector memory that a check allows."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM)


def interpreter(interpret: bool):
    """Interpret mode as strict as the hardware: unwritten and out-of-bounds memory reads as NaN."""
    return pltpu.InterpretParams(out_of_bounds_reads='uninitialized') if interpret else False


def by_batch(call: Callable[..., Any], layer: jax.Array | int, *scalars: jax.Array) -> Any:
    """Calls a kernel for as many batch rows at a time as fit scalar memory.

    All other operands are passed whole: slicing a cache would copy it. Index maps add the
    first batch row to theirs.

    Args:
      call: takes int32 `[2]`, layer and first batch row, then the scalars of its batch rows, flat.
      layer: an int or an int32 scalar.
      scalars: int32 `[B, ...]`; those of one batch row fit.

    Returns:
      The results of the calls, joined along their first axis.
    """
    batch = scalars[0].shape[0]
    room = max(1, (SMEM // 4 - FEW) // (sum(x.size for x in scalars) // batch))
    rows = pl.cdiv(batch, pl.cdiv(batch, room))  # about as many in each call
    results = []
    for first in range(0, batch, rows):
        origin = jnp.stack([jnp.asarray(layer, jnp.int32).reshape(()), jnp.int32(first)])
        results.append(call(origin, *(x[first : first + rows].reshape(-1) for x in scalars)))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)


def visited(bounds_ref, row, step):
    """The block that a step visits; steps past the end stay, so that nothing is fetched anew."""
    first, end = bounds_ref[row * BOUNDS], bounds_ref[row * BOUNDS + 1]
    return jnp.minimum(first + step, jnp.maximum(end - 1, 0))


def visit(bounds_ref, row, step, update: Callable[[bool], None]) -> None:
    """Calls `update(masked)` for this step of a row of blocks, or not at all."""
    first, end, whole_first, whole_end = (bounds_ref[row * BOUNDS + n] for n in range(BOUNDS))
    block = first + step
    whole = (block >= whole_first) & (block < whole_end)
    pl.when((block < end) & whole)(lambda: update(False))
    pl.when((block < end) & ~whole)(lambda: update(True))


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """a . b over one axis of each, accumulated in f32; f32 operands are not rounded to bf16."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def column(row: jax.Array) -> jax.Array:
    """Turns `[1, n]` of a 32-bit type into `[n, LANES]`, each value repeated along its row."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def lanes(x: jax.Array, width: int) -> jax.Array:
    """Widens or narrows `[n, LANES]` of repeated values to `[n, width]`."""
    return jnp.tile(x, (1, pl.cdiv(width, LANES)))[:, :width]
