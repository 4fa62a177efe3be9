"""Compiles every attention kernel for TPUs and lowers it for CUDA, without an accelerator.

    python -m experiments.run compile_attention

`make tpu` installs the TPU compiler, libtpu. Prints compile time and memory of each kernel at real
sizes (D 128, 32k keys) for v5e, v5p and v6e, and lowers the GPU kernels for CUDA. Fails if a kernel
does not compile. On 2 cores of an AMD EPYC virtual machine: about 80 seconds. Expected: at most
2 MiB of temporaries for the kernels that read a cache, since they neither copy it nor build a dense
mask.
"""

import dataclasses
from typing import Literal

Target = Literal['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'cuda']


@dataclasses.dataclass(frozen=True)
class Config:
    """Targets, shapes and dtype.

    Attributes:
      targets: TPU slices (kernels are compiled for one chip of each) and `cuda` (lowered only).
      with_terms: those for which kernels are also compiled with a bias and noise per key and with a
        temperature.
      batch_size, heads, kv_heads, channels: B, H, K and C.
      queries: number of queries in training.
      keys: number of keys in training and in the cache.
      layers: number of layers in the stacked cache; kernels read one of them in place.
      nodes: number of nodes of the draft tree.
      kept: number of blocks of 128 rows that `sparse_decode` reads.
      dtype: dtype of queries, keys and values.
    """

    targets: tuple[Target, ...] = ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'cuda')
    with_terms: tuple[Target, ...] = ('v5e:2x2', 'cuda')
    batch_size: int = 1
    heads: int = 32
    kv_heads: int = 8
    channels: int = 128
    queries: int = 32_768
    keys: int = 32_768
    layers: int = 4
    nodes: int = 64
    kept: int = 32
    dtype: Literal['float32', 'bfloat16'] = 'bfloat16'

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f'--heads {self.heads}: not a multiple of --kv-heads {self.kv_heads}')
        if self.keys < max(self.queries, self.nodes, 128 * self.kept):
            raise ValueError(f'--keys {self.keys}: fewer than queries, nodes or kept rows')


SCALES = {
    'real': Config(),
    'tiny': Config(('cuda',), ('cuda',), 1, 4, 2, 64, 256, 512, 2, 8, 2),
}
