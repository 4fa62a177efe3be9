"""Encodes a corpus into ArrayRecord shards, which every experiment takes as --data.

    python -m experiments.run tokenize --data 'my/*.txt' --tokenizer out/bpe --out SHARDS
    python -m experiments.run tokenize --data 'my/*.txt' --tokenizer bytes --workers 8 --out SHARDS
    python -m experiments.run tokenize ... --out SHARDS --hosts 4 --host 0    # 1, 2, 3 elsewhere
    python -m experiments.run tokenize ... --out SHARDS --beam runner=DirectRunner
    python -m experiments.run pretrain --data SHARDS

A shard depends on the text and the tokenizer alone: not on workers, hosts or engine. Each appears
whole or not at all; the same command goes on where it was killed, and does nothing when all is
done. Any CPU; `bench_tokenize` measures time and memory, which does not grow with the text.
"""

import dataclasses

import tyro

# A shard of less text could be smaller than one document.
_LEAST = 1 << 17


@dataclasses.dataclass(frozen=True)
class Config:
    """One corpus.

    Attributes:
      tokenizer: `bytes`, or the folder of a saved tokenizer or bundle.
      data: glob of text files, or a folder of other shards; the interpreter's standard library if
        not given.
      tfds: name of a TFDS dataset with a text feature, instead of `data`.
      shard_bytes: of text in a shard, about.
      workers: processes on this host; 1 encodes in the program itself.
      hosts: how many hosts run this command on one shared folder; JAX's own count if not given.
      host: which of them this is, from 0.
      beam: options of an Apache Beam pipeline to run instead, as in
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
            raise ValueError('--beam: its runner divides the work; leave out --workers and --hosts')


MAKES_OUT = True
SCALES = {'corpus': Config()}
