"""Restores a file that `compress` made, with the model that it was made with.

    python -m experiments.run decompress FILE.tess --model out/demo/ngram

A file made with another model, a truncated or damaged one, and one whose probabilities come out
differently on this machine are refused, each with its reason; nothing is left half-written.
"""

import dataclasses

import tyro


@dataclasses.dataclass(frozen=True)
class Config:
    """One file.

    Attributes:
      file: to restore.
      model: folder of the n-gram or bundle that it was made with.
      to: the restored file; FILE without its suffix if not given.
    """

    file: tyro.conf.Positional[str] = tyro.MISSING
    model: str = tyro.MISSING
    to: str | None = None


SCALES = {'file': Config()}
