"""Speed and length of the arithmetic coder alone, beside the range coder of `constriction`.

    python -m experiments.run bench_arithmetic

On 2 cores of an AMD EPYC virtual machine: 10 seconds and 0.8 GB. Expected there: from the integer
CDF of each symbol (`adaptive`) 2 to 3 times as many symbols per second as `constriction` encodes,
and 5 times as many as it decodes; every stream within 0.1% + 32 bits of its ideal length.
`constriction` (`pip install constriction`, part of the `test` extra) is left out where missing.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """What is coded, and how often.

    Attributes:
      streams: rows that are coded at once.
      symbols: symbols in each of them, where each symbol has its own distribution.
      shared_factor: times as many symbols where one distribution serves all.
      vocab_size: symbols there are.
      precision: bits of the CDF.
      concentration: of the Dirichlet distributions that the symbols come from; 0.3 gives about
        6 bits a symbol.
      repeats: runs of each side, taken in turn; medians are reported.
      seed: of the distributions and the symbols.
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
