"""Kernels for NVIDIA GPUs, in Pallas for Triton."""

from lm.kernels.triton import column_sums, decode, flash, sparse_decode, tree

__all__ = ['column_sums', 'decode', 'flash', 'sparse_decode', 'tree']
