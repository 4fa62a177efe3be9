"""Speed and code length of the arithmetic coder, compared with constriction's range coder.

    python -m experiments.run bench_arithmetic

On 2 cores of an AMD EPYC virtual machine: 10 seconds and 0.8 GB. Expected there: given the integer
CDF of each symbol (`adaptive`), 2 to 3 times constriction's encoding speed and 5 times its decoding
speed; every stream within 0.1% + 32 bits of its ideal length. The rows of `constriction`
(`pip install constriction`, part of the `test` extra) are omitted if it is not installed.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """The coded symbols and the number of runs.

    Attributes:
      streams: rows coded in parallel.
      symbols: symbols per row, where each symbol has its own distribution.
      shared_factor: this many times as many symbols where all share one distribution.
      vocab_size: size of the alphabet.
      precision: bits of the CDF.
      concentration: Dirichlet concentration of the symbols' distributions; 0.3 gives about 6 bits
        per symbol.
      repeats: interleaved runs of each coder; medians are reported.
      seed: random seed of the distributions and the symbols.
    """

    streams: int = 256
    symbols: int = 256
    shared_factor: int = 16
    vocab_size: int = 256
    precision: int = 14
    concentration: float = 0.3
    repeats: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.streams, self.symbols, self.shared_factor, self.repeats) < 1:
            raise ValueError('streams, symbols, shared_factor and repeats: expected 1 or more')


SCALES = {
    'demo': Config(),
    'tiny': Config(streams=4, symbols=16, shared_factor=2, repeats=1),
}
