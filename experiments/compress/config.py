"""Compresses a file losslessly with a byte model, which is needed again to decompress it.

    python -m experiments.run compress FILE --model out/demo/ngram
    python -m experiments.run compress FILE --model out/pretrain-demo/bundle --to FILE.tess

The model is an n-gram or a bundle over bytes. The file is streamed, so memory does not grow with
its size. On 2 cores, an n-gram codes a few hundred kB/s. The probabilities of a transformer are
floats, so its file can be decompressed only where they are bit-identical: on the same kind of
machine, with the same versions.
"""

import dataclasses

import tyro

SUFFIX = '.tess'


@dataclasses.dataclass(frozen=True)
class Config:
    """Input, model and output.

    Attributes:
      file: the file to compress.
      model: folder of an n-gram or of a bundle over bytes.
      to: the compressed file; default FILE.tess.
    """

    file: tyro.conf.Positional[str] = tyro.MISSING
    model: str = tyro.MISSING
    to: str | None = None


SCALES = {'file': Config()}
