"""Attention kernels: speed, fraction of the machine's peaks, comparison with public kernels.

    python -m experiments.run bench_attention

On 2 cores of an AMD EPYC virtual machine: about two minutes. Expected there: XLA attention within
5% of a hand-written jitted softmax. On a GPU (`--scale gpu`): each kernel at B 8, 2k to 32k keys,
bf16, compared with cuDNN, tokamax (where installed), and XLA with a dense mask.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Config:
    """Shapes, dtype and number of runs.

    Attributes:
      batch_size: rows.
      heads, kv_heads, channels: H, K and C.
      lengths: numbers of keys (in training, also of queries), one table row each.
      nodes: number of nodes of the draft tree.
      kept: fraction of the cache that `sparse_decode` reads, in whole blocks.
      dtype: dtype of queries, keys and values.
      repeats: interleaved runs of each implementation; medians are reported.
      peak_size: size of the square matrices whose product gives the matmul peak; a copy of 16 such
        matrices gives the copy peak.
      largest_logits: bytes; dense-mask implementations whose logits need more are omitted.
    """

    batch_size: int = 2
    heads: int = 8
    kv_heads: int = 2
    channels: int = 64
    lengths: tuple[int, ...] = (256, 1024)
    nodes: int = 16
    kept: float = 0.125
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    repeats: int = 15
    peak_size: int = 2048
    largest_logits: int = 2**33

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f'--heads {self.heads}: not a multiple of --kv-heads {self.kv_heads}')
        for name in ('batch_size', 'channels', 'nodes', 'repeats', 'peak_size'):
            if getattr(self, name) < 1:
                raise ValueError(f'--{name.replace("_", "-")}: expected at least 1')
        if not 0 < self.kept <= 1:
            raise ValueError(f'--kept {self.kept}: expected a fraction in (0, 1]')
        if min(self.lengths, default=0) < self.nodes:
            raise ValueError(f'--lengths {self.lengths}: expected at least {self.nodes}, the nodes')


SCALES = {
    'cpu': Config(),
    'tiny': Config(1, 4, 2, 64, (64,), 4, 0.5, repeats=1, peak_size=64),
    'gpu': Config(8, 32, 8, 128, (2048, 8192, 32_768), 64, dtype='bfloat16', peak_size=8192),
}
