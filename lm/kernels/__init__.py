"""Attention kernels: formulas in `reference`, TPU kernels in `mosaic`, GPU kernels in `triton`.

All take `(q_BLHC, k, v, mask, *, scale, softcap, ...)`. The kernels know no model config.
"""
