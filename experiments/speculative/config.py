"""Block efficiency and speed of all drafters, with target and draft models trained here.

Compares chains, the i.i.d. sequences of SpecTr, the trees of recursive speculative decoding (RSD)
and of DySpec, lookup, Token Recycling and early exits, at fixed draft lengths and at fixed budgets
of nodes per target pass, after Jeon et al. 2024 (arXiv 2402.14160), section 5. Each drafted run is
paired with a run of plain decoding.

    python -m experiments.run speculative                   # 2 cores: about 19 minutes, resumable
    python -m experiments.run speculative --scale cpu       # 2 cores: hours, the whole grid
    python -m experiments.run speculative --scale gpu
    python -m experiments.run speculative --spec_bench question.jsonl \\
        --target_bundle DIR --draft_bundles DIR DIR         # Spec-Bench, with your own models

Expected at `demo` on the standard library: the tables in README.md.
"""

import dataclasses
from dataclasses import field
from typing import Any

from experiments.settings import require
from experiments.speculative import drafters
from lm.model import presets
from lm.model.config import Config as ModelConfig
from lm.training.optimizer import OptimizerConfig
from lm.training.train import TrainConfig


def _model(width: int, layers: int, heads: int, hidden: int) -> ModelConfig:
    return ModelConfig(384, width, layers, heads, heads, 32, hidden, max_length=256, unroll=layers)


def _large(width: int, layers: int, heads: int, channels: int, hidden: int) -> ModelConfig:
    return ModelConfig(
        384, width, layers, heads, heads, channels, hidden, max_length=512, dtype='bfloat16'
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """Corpus, models, drafters and grid.

    Attributes:
      data: glob of text files; default: the interpreter's standard library.
      tfds: name of a TFDS dataset with a text feature, instead of `data`.
      tokenizer: `bytes`, `bpe` (trained on the corpus), or the folder of a saved tokenizer.
      vocab_size: vocabulary size of a BPE that is trained here.
      target_bundle: bundle of the target; trained here by default.
      draft_bundles: draft models with the same tokenizer; required with `target_bundle`.
      target, target_train: config and training of a target trained here.
      draft_4, draft_10, draft_50: models with about 4, 10 and 50 times fewer parameters.
      ratios: the draft models to train, by these numbers.
      draft_train: training of the draft models.
      exit_layers: number of the target's layers that an early exit drafts with.
      adapter_train: training of the early exit's adapter.
      spec_bench: Spec-Bench's `question.jsonl`; default: prompts are held-out text.
      prompts: number of prompts; with Spec-Bench, per task.
      prompt_tokens: tokens per prompt. With Spec-Bench, only the last tokens of longer prompts are
        kept: give about 2000 for its long tasks.
      new_tokens: tokens generated after each prompt.
      drafters: rows of the grid.
      ratio: the grid uses the draft model whose size ratio to the target is nearest to this.
      budgets: numbers of draft nodes per tree.
      lengths: draft lengths (depths), for trees with `width` nodes per level.
      width: see `lengths`.
      temperatures: temperatures of target and draft.
      greedy_draft_temperature: temperature of draft trees if the target's is 0.
      batches: batch sizes.
      sweep: drafters that are also run with the other draft models, at `sweep_budget`.
      sweep_budget: see `sweep`.
      longest: longest n-gram that lookup matches.
      repeats: pairs of plain and drafted runs; medians are reported.
      seed: random seed of sampling.
    """

    data: str | None = None
    tfds: str | None = None
    tokenizer: str = 'bytes'
    vocab_size: int = 8192
    target_bundle: str | None = None
    draft_bundles: tuple[str, ...] = ()
    target: ModelConfig = field(default_factory=lambda: _model(192, 4, 6, 512))
    target_train: TrainConfig = field(
        default_factory=lambda: TrainConfig(400, 8, 256, checkpoint_every=100)
    )
    draft_4: ModelConfig = field(default_factory=lambda: _model(128, 2, 4, 320))
    draft_10: ModelConfig = field(default_factory=lambda: _model(80, 2, 2, 208))
    draft_50: ModelConfig = field(default_factory=lambda: _model(40, 1, 2, 64))
    ratios: tuple[int, ...] = (4, 10, 50)
    draft_train: TrainConfig = field(
        default_factory=lambda: TrainConfig(400, 8, 256, checkpoint_every=200)
    )
    exit_layers: int = 1
    adapter_train: TrainConfig = field(
        default_factory=lambda: TrainConfig(100, 8, 256, checkpoint_every=100)
    )
    spec_bench: str | None = None
    prompts: int = 16
    prompt_tokens: int = 96
    new_tokens: int = 96
    drafters: tuple[str, ...] = tuple(drafters.NAMES)
    ratio: int = 50
    budgets: tuple[int, ...] = (6, 14)
    lengths: tuple[int, ...] = (3,)
    width: int = 4
    temperatures: tuple[float, ...] = (0.0, 0.3, 1.0)
    greedy_draft_temperature: float = 0.25
    batches: tuple[int, ...] = (1,)
    sweep: tuple[str, ...] = ('chain', 'recursive')
    sweep_budget: int = 14
    longest: int = 6
    repeats: int = 3
    seed: int = 0

    def __post_init__(self):
        for name in (
            'vocab_size', 'prompts', 'new_tokens', 'exit_layers', 'width', 'longest', 'repeats',
        ):  # fmt: skip
            require(name, getattr(self, name), getattr(self, name) >= 1, 'at least 1')
        require('prompt_tokens', self.prompt_tokens, self.prompt_tokens >= 2, 'at least 2')
        require('budgets', self.budgets, bool(self.budgets or self.lengths), 'one, or --lengths')
        for name in ('temperatures', 'batches', 'drafters'):
            require(name, getattr(self, name), bool(getattr(self, name)), 'at least one')
        require('sweep_budget', self.sweep_budget, self.sweep_budget >= 1, 'at least 1')
        for name in ('budgets', 'lengths', 'batches'):
            for value in getattr(self, name):
                require(name, value, value >= 1, 'at least 1')
        for value in self.temperatures:
            require('temperatures', value, 0 <= value < float('inf'), '0 or more, and finite')
        greedy = self.greedy_draft_temperature
        require('greedy_draft_temperature', greedy, greedy > 0, 'more than 0')
        for ratio in self.ratios:
            require('ratios', ratio, ratio in (4, 10, 50), 'some of 4, 10 and 50')
        require('ratios', self.ratios, bool(self.ratios), 'at least one')
        known, drawn = drafters.NAMES, drafters.WITH_DRAFT_MODEL
        for name in self.drafters:
            require('drafters', name, name in known, f'some of {", ".join(known)}')
        for name in self.sweep:
            require('sweep', name, name in drawn, f'some of {", ".join(drawn)}')
        if 'recursive_branching' in (*self.drafters, *self.sweep):
            factors = drafters.FACTORS
            sweep = (self.sweep_budget,) if 'recursive_branching' in self.sweep else ()
            for budget in (*self.budgets, *sweep):
                expected = f'some of {", ".join(map(str, factors))}, for recursive_branching'
                require('budgets', budget, budget in factors, expected)
        if self.target_bundle is None:
            self._check_trained()
        bundles = (self.target_bundle is None) == (not self.draft_bundles)
        require('draft_bundles', self.draft_bundles, bundles, 'some with --target_bundle, or none')

    def _check_trained(self):
        layers = self.target.n_layers
        require('exit_layers', self.exit_layers, self.exit_layers < layers, f'less than {layers}')
        longest = self.prompt_tokens + self.new_tokens
        for model in (self.target, *(getattr(self, f'draft_{n}') for n in self.ratios)):
            require(
                'new_tokens', self.new_tokens, longest <= model.max_length,
                f'at most {model.max_length} with --prompt_tokens, the positions of a model',
            )  # fmt: skip


_WHOLE_GRID: dict[str, Any] = {
    'budgets': (6, 10, 14, 21, 30),
    'lengths': (2, 3, 4, 5),
    'batches': (1, 4, 16),
    'prompts': 32,
    'sweep': drafters.WITH_DRAFT_MODEL,
}

_SLOWER = OptimizerConfig(learning_rate=1e-3)

RESUMES = True
MESH = 'one'
SCALES = {
    'demo': Config(),
    'tiny': Config(
        target=dataclasses.replace(presets.tiny(), d_model=16, d_ff=16, unroll=1),
        target_train=TrainConfig(3, 2, 16),
        draft_4=dataclasses.replace(presets.tiny(), n_layers=1, d_model=8, d_ff=8, unroll=1),
        ratios=(4,),
        draft_train=TrainConfig(2, 2, 16),
        adapter_train=TrainConfig(2, 2, 16),
        prompts=2,
        prompt_tokens=12,
        new_tokens=8,
        drafters=('recursive', 'early_exit_adapter'),
        budgets=(4,),
        lengths=(),
        temperatures=(0.0, 1.0),
        sweep=(),
        repeats=1,
    ),
    'cpu': Config(
        target=_model(384, 6, 12, 1024),
        target_train=TrainConfig(800, 8, 256, checkpoint_every=100),
        draft_4=_model(256, 3, 8, 640),
        draft_10=_model(192, 3, 6, 256),
        draft_50=_model(96, 2, 3, 160),
        draft_train=TrainConfig(800, 8, 256, checkpoint_every=200),
        exit_layers=2,
        adapter_train=TrainConfig(200, 8, 256, checkpoint_every=100),
        **_WHOLE_GRID,
    ),
    'gpu': Config(
        tokenizer='bpe',
        target=_large(768, 12, 12, 64, 2048),
        target_train=TrainConfig(3000, 32, 512, _SLOWER, checkpoint_every=1000),
        draft_4=_large(512, 6, 8, 64, 1024),
        draft_10=_large(320, 3, 5, 64, 1024),
        draft_50=_large(96, 2, 3, 32, 256),
        draft_train=TrainConfig(3000, 32, 512, checkpoint_every=1000),
        exit_layers=2,
        adapter_train=TrainConfig(1000, 32, 512, checkpoint_every=1000),
        prompt_tokens=128,
        new_tokens=256,
        longest=3,
        **_WHOLE_GRID,
    ),
}
