"""Kernels for TPU, in Pallas for Mosaic."""

from lm.kernels.mosaic import column_sums, decode, flash, sparse_decode, tree

__all__ = ['column_sums', 'decode', 'flash', 'sparse_decode', 'tree']
