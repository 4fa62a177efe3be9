"""Cost of a very large vocabulary: exact search by chunks against dense logits, and merging.

    python -m experiments.run bench_large_vocabulary

On 2 cores: about a minute, 5 GB. Expected there, at V = 2**20 in f32: exact search by chunks takes
about as long as dense logits and top-k, with a seventh of the temporaries. A shortlist by a quarter
of the dimensions takes three fifths of the time; its recall is nine tenths if the variance of the
rows decays over dimensions, and a sixth if it does not.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and number of runs.

    Attributes:
      vocab_size, width: V and D of the table.
      batch_size: B, the number of hidden states.
      k: number of largest logits to find.
      chunk: number of table rows whose logits are computed at a time.
      rank, shortlist: the approximation's dimensions, and its number of tokens with exact logits.
      decay: in the `decaying` table, dimension i is scaled by i**-decay.
      documents, length: number of merged documents, and source tokens in each.
      merges: maximal number of merges per batch.
      source_vocab: vocabulary size of the BPE tokenizer.
      repeats: interleaved runs of each search; medians are reported.
    """

    vocab_size: int = 1 << 20
    width: int = 256
    batch_size: int = 8
    k: int = 20
    chunk: int = 4096
    rank: int = 64
    shortlist: int = 1024
    decay: float = 0.5
    documents: int = 32
    length: int = 512
    merges: int = 1000
    source_vocab: int = 8192
    repeats: int = 7

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.name != 'decay' and getattr(self, field.name) < 1:
                raise ValueError(f'--{field.name}: {getattr(self, field.name)}; at least 1')
        if self.rank > self.width:
            raise ValueError(f'--rank: {self.rank}; at most --width {self.width}')
        if not self.k <= self.shortlist <= self.vocab_size:
            raise ValueError(
                f'--shortlist: {self.shortlist}; expected --k {self.k} to --vocab-size '
                f'{self.vocab_size}'
            )
        if self.source_vocab < 256:
            raise ValueError(f'--source-vocab: {self.source_vocab}; at least 256')


SCALES = {
    'demo': Config(),
    'tiny': Config(2048, 16, 2, 5, 512, 4, 64, documents=4, length=64, merges=20, source_vocab=300,
                   repeats=1),
    'gpu': Config(width=4096, chunk=65_536, rank=256, repeats=15),
}  # fmt: skip
