"""Bits per byte of one LM size over bytes, BPE, arithmetic coding and Equal-Info windows.

Reproduces the comparison of Lester et al., Training LLMs over Neurally Compressed Text (TMLR
12/2024), at sizes from two CPU cores upward. As in the paper, M1 is the byte model that compresses
the text and M2 the language model trained on the result. Each M2 gets the training compute of
`m2_train.steps` steps on raw bytes, including the output table.

    python -m experiments.run equal_info --scale demo        # 2 cores: about 10 minutes
    python -m experiments.run equal_info --scale cpu         # 2 cores: about 40 minutes, resumable
    python -m experiments.run equal_info --scale gpu         # one GPU: minutes
    python -m experiments.run equal_info --data 'my/*.txt'   # your own text

Expected on the standard library: over plain arithmetic coding, M2 stays within 2% of uniform; over
Equal-Info windows, it falls at least 3% below uniform at `demo` and 10% at `cpu`. README.md has the
tables. `paper` has the paper's sizes, for a TPU slice; it is type-checked, not run.
"""

import dataclasses
from dataclasses import field

from lm.model import presets
from lm.model.config import Config as ModelConfig
from lm.training.optimizer import OptimizerConfig
from lm.training.train import TrainConfig


def _model(width: int, layers: int, hidden: int, max_length: int) -> ModelConfig:
    """ReLU as in the paper. ReLU, heads of 64 channels and unrolled layers are fast on a CPU."""
    return ModelConfig(
        384, width, layers, width // 64, width // 64, 64, hidden, max_length=max_length,
        activation='relu', unroll=layers,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Corpus, codecs, models and training.

    Attributes:
      data: glob of text files; default: the interpreter's standard library.
      tfds: name of a TFDS dataset with a text feature, instead of `data`.
      fit_bytes: bytes of training text for the n-gram, M1 and BPE.
      train_bytes: bytes of training text that is encoded for the M2s.
      held_out_bytes: bytes of validation text, used to select the codec's model, and bytes of test
        text, used for all measurements.
      ngram_order: context length of the n-gram, in bytes.
      window_bytes: maximal bytes per window; M1 is reset after as many bytes.
      bpe_vocab_size: size of the BPE vocabulary.
      m1: the byte model M1; the codec is compiled from it if it beats the n-gram.
      m1_train: training of M1.
      m2: the model trained over each representation, which determines its vocabulary.
      m2_train: training of M2; `steps` counts steps over bytes and sets the compute of all rows.
    """

    data: str | None = None
    tfds: str | None = None
    fit_bytes: int = 16_000_000
    train_bytes: int = 6_000_000
    held_out_bytes: int = 150_000
    ngram_order: int = 3
    window_bytes: int = 64
    bpe_vocab_size: int = 65_536
    m1: ModelConfig = field(default_factory=lambda: _model(128, 2, 512, 128))
    m1_train: TrainConfig = field(
        default_factory=lambda: TrainConfig(300, 32, 64, checkpoint_every=100)
    )
    m2: ModelConfig = field(default_factory=lambda: _model(128, 4, 512, 128))
    m2_train: TrainConfig = field(
        default_factory=lambda: TrainConfig(450, 8, 128, checkpoint_every=150)
    )

    def __post_init__(self):
        for name in ('fit_bytes', 'train_bytes', 'held_out_bytes', 'window_bytes'):
            if getattr(self, name) < 1:
                raise ValueError(f'--{name}: {getattr(self, name)}; expected at least 1')
        if self.window_bytes >= self.m1.max_length:
            raise ValueError(
                f'--window_bytes: {self.window_bytes}; expected less than {self.m1.max_length}, '
                'the number of positions of M1'
            )
        if self.m1_train.length != self.window_bytes:
            raise ValueError(
                f'--m1_train.length: {self.m1_train.length}; expected window_bytes = '
                f'{self.window_bytes}: M1 is trained on the stretches between its resets'
            )
        if self.m2_train.length > self.m2.max_length or self.m2_train.length % 2:
            raise ValueError(
                f'--m2_train.length: {self.m2_train.length}; expected an even number up to '
                f'{self.m2.max_length}, the number of positions of M2'
            )


_RSQRT = OptimizerConfig(
    'adafactor', learning_rate=1e-2, schedule='rsqrt', warmup_steps=10_000, weight_decay=0.0
)

RESUMES = True
MESH = 'auto'
SCALES = {
    'demo': Config(),
    'tiny': Config(
        fit_bytes=40_000,
        train_bytes=20_000,
        held_out_bytes=2_000,
        ngram_order=1,
        window_bytes=8,
        bpe_vocab_size=300,
        m1=dataclasses.replace(presets.tiny(), d_model=16, d_ff=16, unroll=2),
        m1_train=TrainConfig(steps=2, batch_size=2, length=8),
        m2=dataclasses.replace(presets.tiny(), n_layers=1, d_model=16, d_ff=16),
        m2_train=TrainConfig(steps=3, batch_size=2, length=16),
    ),
    'cpu': Config(
        train_bytes=14_000_000,
        held_out_bytes=300_000,
        m1=_model(192, 3, 768, 128),
        m1_train=TrainConfig(steps=800, batch_size=32, length=64, checkpoint_every=200),
        m2=_model(192, 4, 768, 128),
        m2_train=TrainConfig(steps=1000, batch_size=8, length=128, checkpoint_every=200),
    ),
    'gpu': Config(
        train_bytes=64_000_000,
        fit_bytes=64_000_000,
        held_out_bytes=1_000_000,
        ngram_order=4,
        m1=dataclasses.replace(presets.m1_3m(), unroll=3),
        m1_train=TrainConfig(steps=5000, batch_size=256, length=64, checkpoint_every=1000),
        m2=dataclasses.replace(presets.m2_25m(), dtype='bfloat16', unroll=6),
        m2_train=TrainConfig(steps=3000, batch_size=64, length=512, checkpoint_every=500),
    ),
    'paper': Config(
        tfds='c4/en:3.1.0',
        fit_bytes=10**12,
        train_bytes=10**13,
        held_out_bytes=10**7,
        ngram_order=5,
        window_bytes=512,
        m1=presets.m1_3m(),
        m1_train=TrainConfig(2_500_000, 128, 512, _RSQRT, checkpoint_every=10_000),
        m2=presets.m2_2b(),
        m2_train=TrainConfig(200_000, 256, 512, _RSQRT, checkpoint_every=5_000),
    ),
}
