"""Decoding speed: plain decoding against the weight-streaming limit, and the cost of a draft round.

    python -m experiments.run bench_decode

On 2 cores: about 2 minutes. Expected there, for the 134M Llama in f32: plain greedy decoding of one
row reaches at least 80% of the speed at which the weights can be read; a pass over 8 nodes takes at
most 1.8 times a pass over one; the host accounts for less than 5% of a round. Hugging Face
`generate` is timed on the same weights where transformers and torch are installed. `--scale gpu`
measures a 1B-class model in bf16.
"""

import dataclasses

from lm.model.config import Config as ModelConfig

LLAMA_134M = ModelConfig(32_000, 768, 12, 12, 12, 64, 2048, max_length=1024)
DRAFT_6M = ModelConfig(32_000, 96, 2, 2, 2, 48, 256, max_length=1024)
LLAMA_1B = ModelConfig(
    32_000, 2048, 22, 32, 4, 64, 5632, max_length=2048, dtype='bfloat16', param_dtype='bfloat16'
)
DRAFT_1B = ModelConfig(
    32_000, 256, 2, 4, 4, 64, 1024, max_length=2048, dtype='bfloat16', param_dtype='bfloat16'
)
TINY = ModelConfig(384, 32, 2, 2, 2, 16, 64, max_length=128)


@dataclasses.dataclass(frozen=True)
class Config:
    """Models, sizes and number of runs.

    Attributes:
      model: the target, with random weights.
      draft: the draft model of the profiled round.
      factors: branching factors of its draft trees, level by level.
      batches: batch sizes.
      prompt_tokens, new_tokens: tokens per row.
      nodes: tree sizes of the cost curve.
      repeats: interleaved runs of each implementation; medians are reported.
      matrix: size of the square matrix whose product with a vector gives the streaming limit.
    """

    model: ModelConfig = LLAMA_134M
    draft: ModelConfig = DRAFT_6M
    factors: tuple[int, ...] = (2, 2)
    batches: tuple[int, ...] = (1, 8)
    prompt_tokens: int = 16
    new_tokens: int = 32
    nodes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    repeats: int = 9
    matrix: int = 8192

    def __post_init__(self):
        for name in ('prompt_tokens', 'repeats', 'matrix'):
            if getattr(self, name) < 1:
                raise ValueError(f'--{name.replace("_", "-")}: expected at least 1')
        if self.new_tokens < 2:
            raise ValueError('--new-tokens: expected at least 2')
        if self.prompt_tokens + self.new_tokens > self.model.max_length:
            raise ValueError(
                f'--prompt-tokens {self.prompt_tokens} and --new-tokens {self.new_tokens}: the '
                f'model has {self.model.max_length} positions'
            )
        if 1 not in self.batches:
            raise ValueError(f'--batches {self.batches}: must hold 1')
        if 1 not in self.nodes or 8 not in self.nodes:
            raise ValueError(f'--nodes {self.nodes}: must hold 1 and 8, which are compared')


SCALES = {
    'cpu': Config(),
    'tiny': Config(TINY, TINY, (2,), (1, 2), 4, 4, (1, 8), repeats=2, matrix=64),
    'gpu': Config(LLAMA_1B, DRAFT_1B, new_tokens=64, nodes=(1, 2, 4, 8, 16, 32, 64), matrix=16_384),
}
