"""Encodes a corpus into ArrayRecord shards, which all experiments accept as --data.

    python -m experiments.run tokenize --data 'my/*.txt' --tokenizer out/bpe --out SHARDS
    python -m experiments.run tokenize --data 'my/*.txt' --tokenizer bytes --workers 8 --out SHARDS
    python -m experiments.run tokenize ... --out SHARDS --hosts 4 --host 0    # 1, 2, 3 elsewhere
    python -m experiments.run tokenize ... --out SHARDS --beam runner=DirectRunner
    python -m experiments.run pretrain --data SHARDS

Shards depend only on the text and the tokenizer, not on workers, hosts or engine. They are written
atomically: the same command resumes a killed run, and does nothing when all shards exist. Any CPU
will do; `bench_tokenize` measures time and memory, which does not grow with the text.
"""

import dataclasses

import tyro

# Minimal bytes of text per shard; a smaller shard could be smaller than one document.
_LEAST = 1 << 17


@dataclasses.dataclass(frozen=True)
class Config:
    """Corpus, tokenizer, and division of the work.

    Attributes:
      tokenizer: `bytes`, or the folder of a saved tokenizer or bundle.
      data: glob of text files, or a folder of other shards; default: the interpreter's standard
        library.
      tfds: name of a TFDS dataset with a text feature, instead of `data`.
      shard_bytes: approximate bytes of text per shard.
      workers: processes on this host; with 1, the main process encodes.
      hosts: number of hosts that run this command on a shared folder; default: JAX's host count.
      host: index of this host, from 0.
      beam: options of an Apache Beam pipeline, to use it instead, as in
        `runner=DataflowRunner,project=P,region=R,temp_location=gs://B/tmp`.
    """

    tokenizer: str = tyro.MISSING
    data: str | None = None
    tfds: str | None = None
    shard_bytes: int = 1 << 28
    workers: int = 1
    hosts: int | None = None
    host: int | None = None
    beam: str | None = None

    def __post_init__(self):
        if self.shard_bytes < _LEAST:
            raise ValueError(f'--shard_bytes: {self.shard_bytes}; expected at least {_LEAST}')
        if self.workers < 1:
            raise ValueError(f'--workers: {self.workers}; expected at least 1')
        if (self.hosts is None) != (self.host is None):
            raise ValueError('--hosts and --host: give both, or neither')
        if self.hosts is not None and self.host is not None and not 0 <= self.host < self.hosts:
            raise ValueError(f'--host {self.host}: expected 0 to {self.hosts - 1} (--hosts)')
        if self.beam is not None and (self.hosts is not None or self.workers > 1):
            raise ValueError('--beam: its runner divides the work; omit --workers and --hosts')


MAKES_OUT = True
SCALES = {'corpus': Config()}
