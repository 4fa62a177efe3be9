"""Zero-shot tokenizer transfer, after Minixhofer et al. 2024 (arXiv 2405.07883).

A language model over BPE gets another tokenizer: its token tables are predicted by a hypernetwork
or made by a heuristic, and its body is unchanged. It is evaluated zero-shot, and after a few steps
of continued training.

    python -m experiments.run transfer                       # 2 cores: about 25 minutes, resumable
    python -m experiments.run transfer --bundle out/pretrain/bundle --data 'my/*.txt'
    python -m experiments.run transfer --bundle out/transfer/source/bundle \\
        --hypernetwork_bundle out/transfer/bundles/hypernetwork --targets bytes
    python -m experiments.run transfer --ranks 'tokenizers/*.tiktoken'
    python -m experiments.run transfer --scale gpu

`--bundle` takes a bundle of `pretrain` or `import_hf`. Expected at `demo` on the standard library:
the tables in README.md. `paper` has the paper's sizes; it is only type-checked.
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
    """First stage; in the paper, 10,000 steps of 16,384 rows with a peak learning rate of 3e-4."""
    return TrainConfig(steps, rows, 2, _adam(3e-4, schedule='constant'), checkpoint_every=steps)


def _adam(learning_rate: float, **more) -> OptimizerConfig:
    fields = {'weight_decay': 0.01, 'b2': 0.95, 'clip': 0.1, **more}
    return OptimizerConfig(learning_rate=learning_rate, **fields)


@dataclasses.dataclass(frozen=True)
class Config:
    """Corpus, models, targets and training.

    Attributes:
      data: glob of text files; default: the interpreter's standard library.
      bundle: the source model; default: it is trained here.
      hypernetwork_bundle: a hypernetwork that an earlier run trained for that model, its
        `bundles/hypernetwork`; default: it is trained here.
      ranks: glob that matches `r50k_base.tiktoken` (GPT-2) and `cl100k_base.tiktoken`; if a file is
        missing, the first 5,000 tokens are used.
      targets: tokenizers that the model is transferred to.
      oracle: targets with which a model is trained from scratch, for comparison.
      vocab_size: vocabulary size of the model's own BPE, if it is trained here.
      model, train: config and training of a source model trained here.
      hypernetwork: the hypernetwork's config; its widths follow from the model.
      sampled_size: table rows of each tokenizer sampled in training.
      workers: processes that sample tokenizers ahead of time; 0 for a thread.
      identity: first stage, which learns the source's own rows; `batch_size` counts rows.
      transfer: second stage, over sampled tokenizers.
      auxiliary: weight of the distance between rows in the loss, in the second stage and in
        continued training.
      shots: numbers of steps of continued training after the transfer; 0 is zero-shot.
      continued: continued training; its `steps` are the largest of `shots`.
      reductions: reductions of sequence length in dynamic tokenization, as fractions of the
        reduction that whole words would give.
      variants: targets to which a model fine-tuned on prose is transferred by task arithmetic.
      variant_steps: steps of that fine-tuning, otherwise as in `continued`.
      task_weights: weights of the base's change in continued training.
      valid_bytes: bytes of held-out text for evaluation.
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
