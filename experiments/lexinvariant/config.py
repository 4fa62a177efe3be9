"""Lexinvariant language models, without fixed embeddings (Huang et al. 2023, arXiv 2305.16349).

A standard and a lexinvariant model of the same size are trained on the same text. They are compared
by perplexity at each position, on substitution ciphers, and on look-up and permutation tasks. Mixed
models, in which the row of each symbol is random with probability p, are compared too.

    python -m experiments.run lexinvariant                  # 2 cores: about 17 minutes, resumable
    python -m experiments.run lexinvariant --scale gpu
    python -m experiments.run lexinvariant --prose 'novels/*.txt' --code 'src/*.c'
    python -m experiments.run lexinvariant --model.no-induction-init --bpe-domains --probabilities

Expected at `demo` on the standard library: a perplexity gap that closes with the context, and
several times as many correct look-ups as the standard model; no deciphering, and no gain from p.
README.md has the tables. `paper` has the paper's sizes (150M parameters); it is only type-checked.
"""

import dataclasses
from dataclasses import field
from typing import Literal

from experiments.settings import require
from lm.model.config import Config as ModelConfig
from lm.training.optimizer import OptimizerConfig
from lm.training.train import TrainConfig


def _model(width: int, layers: int, heads: int, hidden: int, length: int, **more) -> ModelConfig:
    return ModelConfig(
        256, width, layers, heads, heads, width // heads, hidden, max_length=length,
        activation='relu', qkv_bias=True, tied=True, **more,
    )  # fmt: skip


DOMAINS = ('prose', 'code')


@dataclasses.dataclass(frozen=True)
class Config:
    """Texts, models, training and evaluations.

    Attributes:
      prose, code: globs of text files; default: the standard library's documentation strings and
        comments, and the rest of its source.
      kind: kind of the lexinvariant tables. The paper's are `gaussian`; `demo` uses `permuted`,
        whose rows are easier for a small model to tell apart.
      model: the model's config; the tokenizer determines its vocabulary size. In `demo`, both
        models are initialised with induction heads (`lm.model.induction`).
      train: training of each model.
      bpe_size: size of the small BPE vocabulary; characters are the other vocabulary.
      bpe_domains: domains on which models over BPE are trained.
      probabilities: values of p for the mixed models, between 0 and 1.
      valid_bytes: maximal bytes of held-out text per domain.
      probe_steps, probe_batch, probe_hidden: size and training of the 2-layer probe.
      ciphers: number of held-out texts to decipher.
      contexts: numbers of ciphertext characters at which accuracy is reported.
      climbs: restarts of the classical attack; the best key counts.
      queries: number of queries per reasoning task.
      pairs: number of pairs in a look-up, which asks for one of them.
      examples: number of examples of a permutation before the query.
      symbols: number of symbols that a permutation reorders.
    """

    prose: str | None = None
    code: str | None = None
    kind: Literal['gaussian', 'permuted'] = 'permuted'
    model: ModelConfig = field(
        default_factory=lambda: _model(
            128, 2, 2, 128, 512, unroll=2, scale_embeddings=True, induction_init=True
        )
    )
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=300,
            batch_size=8,
            length=512,
            optimizer=OptimizerConfig('muon', learning_rate=1e-2, warmup_steps=100),
            checkpoint_every=100,
        )
    )
    bpe_size: int = 512
    bpe_domains: tuple[str, ...] = DOMAINS
    probabilities: tuple[float, ...] = (0.1, 0.2, 0.5)
    valid_bytes: int = 60_000
    probe_steps: int = 300
    probe_batch: int = 8
    probe_hidden: int = 512
    ciphers: int = 96
    contexts: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    climbs: int = 32
    queries: int = 512
    pairs: int = 8
    examples: int = 6
    symbols: int = 4

    def __post_init__(self):
        for name in (
            'bpe_size', 'valid_bytes', 'probe_steps', 'probe_batch', 'probe_hidden', 'ciphers',
            'climbs', 'queries', 'pairs', 'examples',
        ):  # fmt: skip
            require(name, getattr(self, name), getattr(self, name) >= 1, 'at least 1')
        require('symbols', self.symbols, 2 <= self.symbols <= 10, '2 to 10')
        require('pairs', self.pairs, self.pairs <= 31, 'at most 31')
        for p in self.probabilities:
            require('probabilities', p, 0 < p < 1, 'between 0 and 1, exclusive')
        require('contexts', self.contexts, bool(self.contexts), 'at least one')
        for n in self.contexts:
            require('contexts', n, 1 <= n <= self.train.length, f'at most {self.train.length}')
        for name in self.bpe_domains:
            require('bpe_domains', name, name in DOMAINS, f'some of {", ".join(DOMAINS)}')
        require('bpe_size', self.bpe_size, self.bpe_size > 256, 'more than the 256 bytes')
        if not (self.model.tied and self.model.lexinvariant is None):
            raise ValueError('--model: expected tied tables; the experiment sets their kind')


RESUMES = True
MESH = 'auto'
SCALES = {
    'demo': Config(),
    'tiny': Config(
        model=_model(16, 2, 2, 16, 32, induction_init=True),
        train=TrainConfig(3, 4, 32, checkpoint_every=3),
        bpe_size=260,
        bpe_domains=('prose',),
        probabilities=(0.2,),
        valid_bytes=3_000,
        probe_steps=3,
        probe_batch=4,
        probe_hidden=8,
        ciphers=4,
        contexts=(8, 32),
        climbs=1,
        queries=8,
        pairs=3,
        examples=2,
        symbols=3,
    ),
    'gpu': Config(
        kind='gaussian',
        model=_model(512, 8, 8, 2048, 512, dtype='bfloat16'),
        train=TrainConfig(3000, 64, 512, OptimizerConfig(learning_rate=1e-3), checkpoint_every=500),
        bpe_size=8192,
        valid_bytes=1_000_000,
        probe_steps=1000,
        ciphers=512,
        contexts=(16, 32, 64, 128, 256, 512),
        queries=2048,
    ),
    'paper': Config(
        kind='gaussian',
        model=_model(1024, 12, 8, 2816, 512, dtype='bfloat16'),
        train=TrainConfig(250_000, 128, 512, OptimizerConfig('adafactor'), checkpoint_every=1000),
        bpe_size=32_000,
        valid_bytes=10_000_000,
        probe_steps=10_000,
        ciphers=1000,
        contexts=(16, 32, 64, 128, 256, 512),
        queries=2048,
    ),
}
