"""Writes a bundle as a checkpoint of Hugging Face, which transformers loads.

    python -m experiments.run export_hf BUNDLE --out FOLDER
    python -m experiments.run export_hf BUNDLE --out FOLDER --family llama

Weights keep their bits. A bundle that was imported also gets its tokenizer.json back; the other
tokenizers have no such form, and only the model is written.
"""

import dataclasses

import tyro

from experiments.settings import require

MAKES_OUT = True


@dataclasses.dataclass(frozen=True)
class Config:
    """One bundle.

    Attributes:
      bundle: folder of the model.
      family: `model_type` to write; by default the first that has models like this.
      shard_gb: most GB of tensors in one file.
    """

    bundle: tyro.conf.Positional[str] = tyro.MISSING
    family: str | None = None
    shard_gb: float = 5.0

    def __post_init__(self):
        require('shard_gb', self.shard_gb, 0 < self.shard_gb <= 1e6, 'above 0, 1e6 at most')


SCALES = {'folder': Config()}
