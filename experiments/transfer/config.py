"""Zero-shot tokenizer transfer, after Minixhofer et al. 2024 (arXiv 2405.07883).

A language model over BPE gets another tokenizer: its token tables are predicted by a hypernetwork,
or made by a heuristic, and the body stays as it is. Then it is trained on for a few steps.

    python -m experiments.run transfer                       # 2 cores: about 25 minutes, resumable
    python -m experiments.run transfer --bundle out/pretrain/bundle --data 'my/*.txt'
    python -m experiments.run transfer --bundle out/transfer/source/bundle \\
        --hypernetwork_bundle out/transfer/bundles/hypernetwork --targets bytes
    python -m experiments.run transfer --ranks 'tokenizers/*.tiktoken'
    python -m experiments.run transfer --scale gpu

`--bundle` takes what `pretrain` or `import_hf` made. Expected at `demo` on the standard library:
the README has the tables. `paper` holds the paper's sizes; it is type-checked only.
"""

import dataclasses
from dataclasses import field
from typing import Literal

from experiments.settings import require
from lm.model import presets
from lm.model.config import Config as ModelConfig
from lm.training.optimizer import OptimizerConfig
from lm.training.train import TrainConfig
from tokenization.transfer.hypernetwork import HypernetworkConfig

Target = Literal['bpe_same', 'bpe_4x', 'bpe_code', 'gpt2', 'cl100k', 'bytes', 'equal_info']
TARGETS: tuple[Target, ...] = (
    'bpe_same', 'bpe_4x', 'bpe_code', 'gpt2', 'cl100k', 'bytes', 'equal_info',
)  # fmt: skip


def _model() -> ModelConfig:
    return ModelConfig(384, 128, 3, 4, 4, 32, 384, max_length=256, activation='relu', unroll=3)


def _identity(steps: int, rows: int) -> TrainConfig:
    """The paper's first stage: 10,000 steps of 16,384 rows, up to 3e-4."""
    return TrainConfig(steps, rows, 2, _adam(3e-4, schedule='constant'), checkpoint_every=steps)


def _adam(learning_rate: float, **more) -> OptimizerConfig:
    fields = {'weight_decay': 0.01, 'b2': 0.95, 'clip': 0.1, **more}
    return OptimizerConfig(learning_rate=learning_rate, **fields)


@dataclasses.dataclass(frozen=True)
class Config:
    """One comparison.

    Attributes:
      data: glob of text files; the interpreter's standard library if not given.
      bundle: a model to start from, instead of one that is trained here.
      hypernetwork_bundle: the hypernetwork that an earlier run trained for that model, its
        `bundles/hypernetwork`, instead of one that is trained here.
      ranks: glob that finds `r50k_base.tiktoken` (GPT-2) and `cl100k_base.tiktoken`; of one that
        it does not find, the first 5,000 tokens stand for it.
      targets: tokenizers that the model is moved to.
      oracle: those of them that a model is trained from scratch with, for comparison.
      vocab_size: of the model's own BPE, if it is trained here.
      model, train: the model that is trained here, and how.
      hypernetwork: its shape; widths follow from the model.
      sampled_size: rows of the tables of each tokenizer drawn for training.
      workers: processes that draw them ahead; 0 for a thread.
      identity: the stage that learns the source's own rows; `batch_size` counts rows.
      transfer: the stage on drawn tokenizers.
      auxiliary: weight of the rows' distance in both trainings after a transfer.
      shots: steps of training on after the transfer, 0 is zero-shot.
      continued: how; its `steps` are the largest of `shots`.
      reductions: dynamic tokenization merges until texts are so much shorter, as shares of what
        whole words would save.
      variants: those of `targets` that a model fine-tuned on prose is moved to, by task
        arithmetic.
      variant_steps: of fine-tuning it, as in `continued`.
      task_weights: of what training after the transfer changed in the base.
      valid_bytes: of held-out text to evaluate on.
    """

    data: str | None = None
    bundle: str | None = None
    hypernetwork_bundle: str | None = None
    ranks: str | None = None
    targets: tuple[Target, ...] = TARGETS
    oracle: tuple[Target, ...] = ('bytes',)
    vocab_size: int = 8192
    model: ModelConfig = field(default_factory=_model)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(1000, 16, 128, checkpoint_every=250)
    )
    hypernetwork: HypernetworkConfig = field(
        default_factory=lambda: HypernetworkConfig(
            n_layers=1, head_dim=32, residual=True, chunk=4096
        )
    )
    sampled_size: int = 4096
    workers: int = 0
    identity: TrainConfig = field(default_factory=lambda: _identity(50, 1024))
    transfer: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            600, 16, 128, _adam(1e-3, clip=1.0), checkpoint_every=200
        )
    )
    auxiliary: float = 0.5
    shots: tuple[int, ...] = (0, 50)
    continued: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            50, 16, 128, _adam(1e-3, schedule='constant', warmup_steps=10), checkpoint_every=50
        )
    )
    reductions: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    variants: tuple[Target, ...] = ('bpe_same',)
    variant_steps: int = 50
    task_weights: tuple[float, ...] = (0.0, 0.5)
    valid_bytes: int = 60_000

    def __post_init__(self):
        for name in ('vocab_size', 'valid_bytes', 'variant_steps'):
            require(name, getattr(self, name), getattr(self, name) >= 1, 'at least 1')
        require('vocab_size', self.vocab_size, self.vocab_size > 256, 'more than the 256 bytes')
        require('sampled_size', self.sampled_size, self.sampled_size > 257, 'more than the bytes')
        require('targets', self.targets, bool(self.targets), f'some of {", ".join(TARGETS)}')
        for name in ('targets', 'oracle', 'variants'):
            for target in getattr(self, name):
                require(name, target, target in TARGETS, f'some of {", ".join(TARGETS)}')
        require('shots', self.shots, min(self.shots, default=-1) == 0, '0 and more steps')
        for share in self.reductions:
            require('reductions', share, 0 < share <= 1, 'above 0, at most 1')
        given = self.hypernetwork_bundle
        require('hypernetwork_bundle', given, not given or self.bundle is not None,
                'none without --bundle: it was trained for one model')  # fmt: skip
        require('auxiliary', self.auxiliary, self.auxiliary >= 0, 'at least 0')


RESUMES = True
MESH = 'auto'
SCALES = {
    'demo': Config(),
    'tiny': Config(
        targets=('bpe_same',),
        oracle=('bpe_same',),
        vocab_size=300,
        model=dataclasses.replace(presets.tiny(), d_model=16, d_ff=16, head_dim=8, n_heads=2),
        train=TrainConfig(3, 4, 32, checkpoint_every=3),
        hypernetwork=HypernetworkConfig(n_layers=1, head_dim=8, pieces=4, chunk=128),
        sampled_size=320,
        identity=_identity(2, 32),
        transfer=TrainConfig(2, 4, 32, checkpoint_every=2),
        shots=(0, 2),
        reductions=(0.5,),
        continued=TrainConfig(2, 4, 32, checkpoint_every=2),
        variant_steps=2,
        valid_bytes=3_000,
    ),
    'gpu': Config(
        oracle=TARGETS,
        vocab_size=32_768,
        model=dataclasses.replace(presets.m2_25m(), dtype='bfloat16'),
        train=TrainConfig(5000, 64, 512),
        hypernetwork=HypernetworkConfig(residual=True),
        sampled_size=16_384,
        identity=_identity(1000, 16_384),
        transfer=TrainConfig(3000, 64, 128, _adam(3e-4), checkpoint_every=500),
        shots=(0, 100, 500),
        continued=TrainConfig(500, 32, 512, _adam(3e-5), checkpoint_every=500),
        valid_bytes=1_000_000,
    ),
    'paper': Config(
        bundle='mistral_7b',  # by import_hf
        oracle=(),
        hypernetwork=HypernetworkConfig(head_dim=128),
        sampled_size=32_768,
        identity=_identity(10_000, 16_384),
        transfer=TrainConfig(190_000, 128, 128, _adam(6e-5, warmup_steps=10_000)),
        shots=(0, 50_000),
        continued=TrainConfig(50_000, 32, 512, _adam(3e-6, schedule='constant')),
        valid_bytes=10_000_000,
    ),
}
