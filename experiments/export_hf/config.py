"""Exports a bundle as a Hugging Face checkpoint that transformers can load.

    python -m experiments.run export_hf BUNDLE --out FOLDER
    python -m experiments.run export_hf BUNDLE --out FOLDER --family llama

Weights are exported bit for bit. The tokenizer.json of an imported bundle is exported too; other
tokenizers cannot be represented in that format, so only the model is written.
"""

import dataclasses

import tyro

from experiments.settings import require

MAKES_OUT = True


@dataclasses.dataclass(frozen=True)
class Config:
    """The bundle and the output format.

    Attributes:
      bundle: folder of the bundle.
      family: `model_type` to write; by default the first one that can represent the model.
      shard_gb: maximal size of one file of tensors, in GB.
    """

    bundle: tyro.conf.Positional[str] = tyro.MISSING
    family: str | None = None
    shard_gb: float = 5.0

    def __post_init__(self):
        require('shard_gb', self.shard_gb, 0 < self.shard_gb <= 1e6, 'above 0, at most 1e6')


SCALES = {'folder': Config()}
