"""Cost of sampling a random tokenizer for each training step, which it must not delay.

    python -m experiments.run bench_sampled

On 2 cores: about 20 seconds. Expected there: counting 2,048 texts, sampling a tokenizer of 32,768
tokens from them, and building its Unigram model take well under 2 seconds in all.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and number of runs.

    Attributes:
      texts, text_bytes: size of the queue of texts, 16 batches, that a tokenizer is sampled from.
      length: tokens per row.
      vocab_size: V of the sampled tokenizers.
      pieces: maximal number of source tokens per token.
      source_size: size of the source's BPE vocabulary.
      train_bytes: size of the training text.
      repeats: number of runs; medians are reported.
    """

    texts: int = 2048
    text_bytes: int = 800
    length: int = 128
    vocab_size: int = 32_768
    pieces: int = 7
    source_size: int = 8192
    train_bytes: int = 1 << 23
    repeats: int = 5

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f'--{field.name}: {getattr(self, field.name)}; at least 1')
        if self.texts % 16:
            raise ValueError(f'--texts: {self.texts}; expected a multiple of 16 batches')


SCALES = {
    'demo': Config(),
    'tiny': Config(64, 400, 32, 600, 7, 300, 1 << 16, 1),
    'gpu': Config(repeats=15),
}
