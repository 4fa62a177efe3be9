"""Training-step throughput against the machine's matmul peak, and memory of the chunked loss.

    python -m experiments.run bench_train

On 2 cores of an AMD EPYC virtual machine: about a minute. Expected there: a step at d = 512 in f32
reaches at least half of the matmul peak measured in the same run. The same model in PyTorch is
timed where torch is installed (`make torch`). Without the table and its gradient, the loss needs at
most 1.2 times as much memory at V = 65,536 as at V = 1,024.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and number of runs.

    Attributes:
      width: d, the width of the model.
      layers: number of blocks.
      batch_size, length: rows of a step, and tokens per row.
      repeats: interleaved runs; medians are reported.
      peak_size: size of the square matrices whose product gives the peak.
      small_vocab, large_vocab: the two vocabulary sizes at which the loss's memory is compared.
    """

    width: int = 512
    layers: int = 4
    batch_size: int = 8
    length: int = 128
    repeats: int = 7
    peak_size: int = 2048
    small_vocab: int = 1024
    large_vocab: int = 65_536


SCALES = {
    'demo': Config(),
    'tiny': Config(64, 1, 2, 16, 1, 64, 512, 4096),
    'gpu': Config(2048, 8, 16, 1024, 7, 8192),
}
