"""Speed of the compiled Equal-Info codec beside tiktoken, same text, same number of entries.

    python -m experiments.run bench_codec

On 2 cores of an AMD EPYC virtual machine: 15 to 30 seconds and 1 GB. Expected there: 4 to 5 times
tiktoken's MB/s in encoding (50 to 80 MB/s), and well over 200 MB/s in decoding.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """What is encoded, with which tables.

    Attributes:
      order: context bytes of the n-gram that the tables are compiled from.
      train_bytes: the n-gram's training text; the whole train split if it is smaller.
      bpe_train_bytes: the BPE vocabularies' training text.
      text_bytes: held-out text to encode, as one piece.
      max_bytes: of the longest string in a table.
      repeats: runs of each side, taken in turn; medians are reported.
    """

    order: int = 3
    train_bytes: int = 1 << 30
    bpe_train_bytes: int = 1 << 30
    text_bytes: int = 1 << 20
    max_bytes: int = 64
    repeats: int = 7

    def __post_init__(self) -> None:
        if min(self.train_bytes, self.bpe_train_bytes, self.text_bytes, self.repeats) < 1:
            raise ValueError('sizes and repeats: expected 1 or more')


SCALES = {
    'demo': Config(),
    'tiny': Config(
        order=1,
        train_bytes=1 << 15,
        bpe_train_bytes=1 << 15,
        text_bytes=1 << 12,
        max_bytes=8,
        repeats=1,
    ),
}
