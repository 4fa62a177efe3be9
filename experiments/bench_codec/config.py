"""Throughput of the compiled Equal-Info codec and of tiktoken: same text, same vocabulary size.

    python -m experiments.run bench_codec

On 2 cores of an AMD EPYC virtual machine: 15 to 30 seconds and 1 GB. Expected there: encoding at 4
to 5 times tiktoken's throughput (50 to 80 MB/s), and decoding well above 200 MB/s.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """The text and the tables.

    Attributes:
      order: context length, in bytes, of the n-gram behind the tables.
      train_bytes: training text of the n-gram; the whole train split if that is smaller.
      bpe_train_bytes: training text of the BPE vocabulary.
      text_bytes: held-out text, encoded as one document.
      max_bytes: length of the longest string in a table.
      repeats: interleaved runs of each tokenizer; medians are reported.
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
