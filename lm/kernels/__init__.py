"""Attention kernels: formulas in `reference`, TPU kernels in `mosaic`, GPU kernels in `triton`.

All take `(q_BLHC, k, v, mask, scoring, *, ...)`; `scoring` maps products to logits. The kernels
know no model config. `mosaic` and `triton` import this package, which imports neither.
"""
