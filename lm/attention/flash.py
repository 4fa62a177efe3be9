"""Attention of many queries as one differentiable function, for training and prefill."""

import functools
from typing import Literal

import jax

from lm.kernels.blocks import BlockSizes
from lm.kernels.mask import Mask
from lm.kernels.mosaic import flash as mosaic
from lm.kernels.scoring import Scoring
from lm.kernels.triton import flash as triton

Backend = Literal['mosaic', 'triton']


def flash(
    q_BLHC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    mask: Mask,
    scoring: Scoring,
    *,
    sizes: BlockSizes | None = None,
    backend: Backend,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns softmax(logits) v and its LSE, differentiable in q, k and v through both results.

    Saves q, k, v, the output and the LSE for the backward pass, and no attention weights
    (FlashAttention-2, Dao 2023).

    Args:
      q_BLHC: queries, bf16 or f32; head h reads key/value head `h // (H / K)`.
      k_BKSC, v_BKSC: keys and values, in the dtype of `q`. Rows without a key may be NaN.
      mask: which keys each query sees, and their bias.
      scoring: see `Scoring`.
      sizes: block sizes of both passes; None for the backend's default.
      backend: 'mosaic' for TPU, 'triton' for NVIDIA GPUs.
      interpret: run on any platform, slowly.

    Returns:
      `[B, L, H, C]` in the dtype of `q`, zeros for a query that sees no key; f32 `[B, L, H]`, the
      LSE, -inf for such a query, whose gradients are zero.

    Raises:
      ValueError: the backend does not support the sizes or the mask.
    """
    return _flash(q_BLHC, k_BKSC, v_BKSC, mask, scoring, sizes, backend, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _flash(q_BLHC, k_BKSC, v_BKSC, mask, scoring, sizes, backend, interpret):
    forward = {'mosaic': mosaic, 'triton': triton}[backend].forward
    return forward(q_BLHC, k_BKSC, v_BKSC, mask, scoring, sizes=sizes, interpret=interpret)


def _flash_forward(q_BLHC, k_BKSC, v_BKSC, mask, scoring, *static):
    out_BLHC, lse_BLH = _flash(q_BLHC, k_BKSC, v_BKSC, mask, scoring, *static)
    return (out_BLHC, lse_BLH), (q_BLHC, k_BKSC, v_BKSC, out_BLHC, lse_BLH, mask, scoring)


def _flash_backward(sizes, backend, interpret, residuals, cotangents):
    *arrays, mask, scoring = residuals
    backward = {'mosaic': mosaic, 'triton': triton}[backend].backward
    gradients = backward(*arrays, *cotangents, mask, scoring, sizes=sizes, interpret=interpret)
    return *gradients, None, None  # bias, noise and temperature are constants


_flash.defvjp(_flash_forward, _flash_backward)
