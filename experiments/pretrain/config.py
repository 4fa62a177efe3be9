"""A plain language model over any tokenizer: train, evaluate, save a bundle.

    python -m experiments.run pretrain                               # bytes; 2 cores: 2 minutes
    python -m experiments.run pretrain --tokenizer bpe --vocab_size 8192
    python -m experiments.run pretrain --tokenizer out/demo/tokenizers/tunstall_65k
    python -m experiments.run pretrain --scale gpu --data 'my/*.txt'
    python -m experiments.run pretrain --data SHARDS                 # that `tokenize` wrote

Expected at `demo` on the standard library: about 2.2 bits per byte over bytes (2 cores of an AMD
EPYC virtual machine).
"""

import dataclasses
from dataclasses import field

from lm.model import presets
from lm.model.config import Config as ModelConfig
from lm.training.train import TrainConfig


def _small() -> ModelConfig:
    return ModelConfig(384, 256, 2, 4, 4, 64, 768, max_length=128, unroll=2)


@dataclasses.dataclass(frozen=True)
class Config:
    """Corpus, tokenizer, model and training.

    Attributes:
      data: glob of text files, or a folder of shards that `tokenize` wrote; default: the
        interpreter's standard library.
      tfds: name of a TFDS dataset with a text feature, instead of `data`.
      tokenizer: `bytes`, `bpe` (trained on the corpus), or the folder of a saved tokenizer or
        bundle; default: that of the shards, or bytes.
      vocab_size: vocabulary size of a BPE that is trained here.
      valid_bytes: bytes of held-out text to evaluate on.
      model: the model's config; its vocabulary size follows from the tokenizer.
      train: the training config.
    """

    data: str | None = None
    tfds: str | None = None
    tokenizer: str | None = None
    vocab_size: int = 8192
    valid_bytes: int = 200_000
    model: ModelConfig = field(default_factory=_small)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(400, 16, 128, checkpoint_every=100)
    )

    def __post_init__(self):
        for name in ('vocab_size', 'valid_bytes'):
            if getattr(self, name) < 1:
                raise ValueError(f'--{name}: {getattr(self, name)}; expected at least 1')


RESUMES = True
MESH = 'auto'
SCALES = {
    'demo': Config(),
    'tiny': Config(
        valid_bytes=2_000,
        model=dataclasses.replace(presets.tiny(), d_model=16, d_ff=16),
        train=TrainConfig(3, 2, 16),
    ),
    'gpu': Config(
        valid_bytes=1_000_000,
        model=dataclasses.replace(presets.m2_25m(), dtype='bfloat16'),
        train=TrainConfig(5000, 64, 512),
    ),
}
