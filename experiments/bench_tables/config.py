"""Training cost of tables drawn at random: time and memory of a step, against a learned table.

    python -m experiments.run bench_tables

On 2 cores: about 3 minutes. Expected there, at V = 32,768: a step of a `permuted` model takes no
longer than with a learned table, and the peak memory of both kinds of random table is lower.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and number of runs.

    Attributes:
      vocab_size: V.
      width, layers: size of the model; heads have 64 channels, the MLP 4 times the width.
      batch_size, length: rows of a step, and tokens per row.
      segments: documents per row; 1 or more.
      probability: p of the partially lexinvariant model, the fraction of symbols drawn at random.
      repeats: interleaved runs of each kind of table; medians are reported.
    """

    vocab_size: int = 32_768
    width: int = 256
    layers: int = 2
    batch_size: int = 16
    length: int = 512
    segments: int = 1
    probability: float = 0.2
    repeats: int = 3

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.name != 'probability' and getattr(self, field.name) < 1:
                raise ValueError(f'--{field.name}: {getattr(self, field.name)}; at least 1')
        if self.segments > self.length:
            raise ValueError(f'--segments: {self.segments}; at most --length {self.length}')
        if self.width % 64:
            raise ValueError(f'--width: {self.width}; expected a multiple of 64')
        if not 0 < self.probability < 1:
            raise ValueError(f'--probability: {self.probability}; expected between 0 and 1')


SCALES = {
    'demo': Config(),
    'tiny': Config(300, 64, 1, 2, 16, 2, repeats=1),
    'gpu': Config(width=1024, layers=8, repeats=7),
}
