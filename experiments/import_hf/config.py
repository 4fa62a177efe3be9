"""Makes a bundle of a checkpoint of Hugging Face: Llama, Mistral, Qwen or Gemma in safetensors.

    python -m experiments.run import_hf FOLDER --out BUNDLE
    python -m experiments.run generate --bundle BUNDLE --prompt "The capital of France"

FOLDER holds config.json, the weights, and tokenizer.json or tokenizer.model. What cannot be
represented exactly is refused before any weight is read. `docs/models.md` has the families.
"""

import dataclasses
from typing import Literal

import tyro

MAKES_OUT = True


@dataclasses.dataclass(frozen=True)
class Config:
    """One checkpoint.

    Attributes:
      folder: of the checkpoint.
      dtype: of the parameters; by default bfloat16 where all of the checkpoint's are, else float32.
    """

    folder: tyro.conf.Positional[str] = tyro.MISSING
    dtype: Literal['float32', 'bfloat16'] | None = None


SCALES = {'folder': Config()}
