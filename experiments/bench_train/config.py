"""Speed of a training step beside the machine's matmul peak, and memory of the chunked loss.

    python -m experiments.run bench_train

On 2 cores of an AMD EPYC virtual machine: about a minute. Expected there: a step at d = 512 in f32
runs at half of the matmul peak measured in the same run, or more; the same model in PyTorch stands
beside it where torch is installed (`make torch`). The loss's memory at V = 65,536 is within 1.2
times that at V = 1,024, the table and its gradient apart.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured.

    Attributes:
      width: of the model, d.
      layers: its blocks.
      batch_size, length: of a step.
      repeats: timed runs of each side, taken in turn; medians are reported.
      peak_size: side of the square matrices whose product gives the peak.
      small_vocab, large_vocab: the two tables whose losses are compared.
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
