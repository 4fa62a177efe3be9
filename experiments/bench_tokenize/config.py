"""Peak memory of `tokenize` at one and at ten times the text, and throughput.

    python -m experiments.run bench_tokenize                 # 2 cores: 1 minute, 0.5 GB of disk
    python -m experiments.run bench_tokenize --tokenizer bytes --megabytes 500

The text is the standard library, repeated. Expected: the same memory in all rows, within a few
megabytes. README.md has the figures.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Tokenizer and sizes.

    Attributes:
      tokenizer: `bpe` (trained on the text), `bytes`, or the folder of a saved tokenizer.
      vocab_size: vocabulary size of the BPE.
      megabytes: size of the smaller text; the larger one is ten times as large.
      files: number of files per text.
      workers: numbers of workers, as in `tokenize`; one table row each.
      shard_bytes: bytes of text per shard.
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
