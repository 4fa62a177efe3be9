"""What a random tokenizer per training step costs, beside the step it must not delay.

    python -m experiments.run bench_sampled

On 2 cores: about 20 seconds. Expected there: counts of 2,048 texts, a tokenizer of 32,768 tokens
drawn from them and its Unigram model in well under 2 seconds, from nothing.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured.

    Attributes:
      texts, text_bytes: the queue a tokenizer is drawn from; 16 batches.
      length: tokens of a row.
      vocab_size: V, of the tokenizers.
      pieces: source tokens per token.
      source_size: entries of the source's BPE vocabulary.
      train_bytes: the text that is trained on.
      repeats: medians are reported.
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
