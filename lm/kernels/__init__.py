"""Attention kernels: formulas in `reference`, TPU kernels in `mosaic`, GPU kernels in `triton`.

All take `(q_BLHC, k, v, mask, scoring, *, ...)`; `scoring` says how products become logits. The
kernels know no model config. `mosaic` and `triton` import this room, and it imports neither.
"""
