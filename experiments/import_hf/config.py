"""Imports a Hugging Face checkpoint (Llama, Mistral, Qwen or Gemma, safetensors) as a bundle.

    python -m experiments.run import_hf FOLDER --out BUNDLE
    python -m experiments.run generate --bundle BUNDLE --prompt "The capital of France"

FOLDER holds config.json, the weights, and tokenizer.json or tokenizer.model. A checkpoint that
cannot be represented exactly is refused before any weight is read. `docs/models.md` lists the
families.
"""

import dataclasses
from typing import Literal

import tyro

MAKES_OUT = True


@dataclasses.dataclass(frozen=True)
class Config:
    """The checkpoint and the dtype of the bundle.

    Attributes:
      folder: folder of the checkpoint.
      dtype: dtype of the parameters; by default bfloat16 if the whole checkpoint is in bfloat16,
        else float32.
    """

    folder: tyro.conf.Positional[str] = tyro.MISSING
    dtype: Literal['float32', 'bfloat16'] | None = None


SCALES = {'folder': Config()}
