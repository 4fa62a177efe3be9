"""Times the steps of sampling a tokenizer, and the batches of the whole pipeline."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from experiments import corpora, report
from experiments.bench_sampled.config import Config
from experiments.report import Column
from tokenization.transfer import sampled, substrings
from tokenization.transfer.decompose import decompose
from tokenization.transfer.sampled_batches import QUEUE, SampledBatches, Settings
from tokenization.vocabularies.bpe import BPETokenizer


def main(config: Config, out: epath.Path) -> dict[str, float]:
    """Prints the table; returns the metrics."""
    del out
    corpus = corpora.standard_library()
    documents = corpora.first_bytes(corpus.train, config.train_bytes)
    source = BPETokenizer.train(documents, config.source_size)
    batch = config.texts // QUEUE
    settings = Settings(
        batch_size=batch, length=config.length, text_bytes=config.text_bytes,
        vocab_size=config.vocab_size, pieces=config.pieces, steps=1 << 16, seed=0,
    )  # fmt: skip
    batches = SampledBatches(documents, source, settings)
    texts = [text for step in range(QUEUE) for text in batches.texts(step)]

    counts = substrings.count(texts)
    tokenizer = sampled.sample(counts, config.vocab_size, 0)
    parts = [substrings.count(texts[i : i + batch]) for i in range(0, len(texts), batch)]

    def build() -> None:
        sampled.sample(counts, config.vocab_size, 0).encode(b'')

    def from_nothing() -> None:
        sampled.sample(substrings.count(texts), config.vocab_size, 0).encode(b'')

    steps = iter(range(QUEUE, QUEUE + 2 + config.repeats))
    batches[next(steps)]
    seconds = {
        'counts of all texts': _median(lambda: substrings.count(texts), config.repeats),
        'counts of one batch': _median(lambda: substrings.count(texts[:batch]), config.repeats),
        'sum of 16 batches': _median(lambda: substrings.add(parts), config.repeats),
        'sampling and Unigram model': _median(build, config.repeats),
        'encode one batch': _median(lambda: tokenizer.encode_batch(texts[:batch]), config.repeats),
        'decompose the vocabulary': _median(
            lambda: decompose(source, tokenizer.tokens, config.pieces), config.repeats
        ),
        'tokenizer from scratch': _median(from_nothing, config.repeats),
        'next training batch': _median(lambda: batches[next(steps)], config.repeats),
    }
    rows: list[dict[str, Any]] = [{'part': k, 'seconds': v} for k, v in seconds.items()]
    report.table(
        rows, [Column('part', 'part'), Column('seconds', 'seconds', '.3f')],
        f'{config.vocab_size:,} tokens from {len(texts):,} texts of {config.text_bytes} bytes, '
        f'{len(counts):,} substrings',
        ['one process; medians'],
    )  # fmt: skip
    names = ('counts', 'batch_counts', 'sum', 'draw', 'encode', 'decompose', 'tokenizer', 'batch')
    return {report.key('seconds', name): row['seconds'] for name, row in zip(names, rows)}


def _median(run: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:]))
