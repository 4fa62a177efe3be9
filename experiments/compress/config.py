"""Compresses a file with a byte model: exact, streaming, readable with the same model alone.

    python -m experiments.run compress FILE --model out/demo/ngram
    python -m experiments.run compress FILE --model out/pretrain-demo/bundle --to FILE.tess

The model is an n-gram or a bundle over bytes. Memory does not grow with the file. On 2 cores an
n-gram codes some hundred kB/s; a transformer's probabilities are floats, so that its file can be
read only where they come out the same: on the same kind of machine, with the same versions.
"""

import dataclasses

import tyro

SUFFIX = '.tess'


@dataclasses.dataclass(frozen=True)
class Config:
    """One file.

    Attributes:
      file: to compress.
      model: folder of an n-gram or of a bundle over bytes.
      to: the compressed file; FILE.tess if not given.
    """

    file: tyro.conf.Positional[str] = tyro.MISSING
    model: str = tyro.MISSING
    to: str | None = None


SCALES = {'file': Config()}
