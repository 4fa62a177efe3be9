"""Decompresses a file made by `compress`, with the model that compressed it.

    python -m experiments.run decompress FILE.tess --model out/demo/ngram

Refuses, with the reason, a file that was made with another model, is truncated or damaged, or whose
probabilities differ on this machine. Never leaves a partial output.
"""

import dataclasses

import tyro


@dataclasses.dataclass(frozen=True)
class Config:
    """Input, model and output.

    Attributes:
      file: the compressed file.
      model: folder of the n-gram or bundle that compressed it.
      to: the decompressed file; default FILE without its suffix.
    """

    file: tyro.conf.Positional[str] = tyro.MISSING
    model: str = tyro.MISSING
    to: str | None = None


SCALES = {'file': Config()}
