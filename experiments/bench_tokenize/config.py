"""What `tokenize` takes: memory of a process at one and at ten times the text, and speed.

    python -m experiments.run bench_tokenize                 # 2 cores: 1 minute, 0.5 GB of disk
    python -m experiments.run bench_tokenize --tokenizer bytes --megabytes 500

The text is the standard library, over and over. Expected: the same memory in all rows, within some
megabytes. The numbers are in README.md.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured.

    Attributes:
      tokenizer: `bpe` (trained on the text), `bytes`, or the folder of a saved one.
      vocab_size: of the BPE.
      megabytes: of the smaller text; the larger one has ten times as many.
      files: that each text is divided into.
      workers: as in `tokenize`, a row of the table for each.
      shard_bytes: of text in a shard.
    """

    tokenizer: str = 'bpe'
    vocab_size: int = 8192
    megabytes: float = 20.0
    files: int = 5
    workers: tuple[int, ...] = (1, 2)
    shard_bytes: int = 1 << 22


SCALES = {
    'demo': Config(),
    'tiny': Config('bytes', megabytes=6.0, files=3, workers=(1,), shard_bytes=1 << 21),
}
