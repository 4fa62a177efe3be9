"""Metrics of a representation that need no model trained over it."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tokenization.coding.next_byte import NextByteModel
from tokenization.equal_info import windows
from tokenization.tokenizer import Tokenizer

_SECONDS = 1.0
_REPEATS = 3


class Encoded(NamedTuple):
    """A tokenizer's ids of held-out documents, with metrics.

    Attributes:
      ids: per document.
      metrics: `bytes_per_token`, `uniform_bits_per_byte`, `encode_mb_per_s`, `decode_mb_per_s`
        and `round_trip_fraction`, the fraction of documents that decode to the original.
    """

    ids: list[np.ndarray]
    metrics: dict[str, float]


def encoded(tokenizer: Tokenizer, documents: Sequence[bytes]) -> Encoded:
    """Encodes and decodes held-out documents, timing both."""
    n_bytes = sum(map(len, documents))
    encode_seconds, ids = median_seconds(lambda: tokenizer.encode_batch(documents))
    decode_seconds, texts = median_seconds(lambda: tokenizer.decode_batch(ids))
    tokens = sum(map(len, ids))
    exact = [text == document for text, document in zip(texts, documents, strict=True)]
    return Encoded(
        ids,
        {
            'bytes_per_token': n_bytes / tokens,
            'uniform_bits_per_byte': np.log2(tokenizer.vocab_size) * tokens / n_bytes,
            'encode_mb_per_s': n_bytes / encode_seconds / 1e6,
            'decode_mb_per_s': n_bytes / decode_seconds / 1e6,
            'round_trip_fraction': float(np.mean(exact)),
        },
    )


def median_seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the median seconds of a few calls, after one warm-up call, and the last result.

    A long call is not repeated.
    """
    result = run()
    seconds: list[float] = []
    while len(seconds) < _REPEATS and sum(seconds) < _SECONDS:
        begin = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds)), result


def unigram_bits_per_byte(
    train_ids: Sequence[np.ndarray], ids: Sequence[np.ndarray], vocab_size: int, n_bytes: int
) -> float:
    """Returns the unigram cost of held-out ids under add-one-smoothed counts of training ids."""
    counts = np.ones(vocab_size)
    for document in train_ids:
        counts += np.bincount(document, minlength=vocab_size)
    bits = -np.log2(counts / counts.sum())
    return sum(float(bits[document].sum()) for document in ids) / n_bytes


def paper_rule_round_trip(
    model: NextByteModel, documents: Sequence[bytes], window_bytes: int
) -> float:
    """Returns the fraction of 16-bit windows under the paper's literal rule that decode correctly.

    Each window is decoded independently, to the longest string with its padded code (Lester et al.,
    D.5).
    """
    config = windows.WindowConfig(16, 'paper', 'every', window_bytes)
    encoded = windows.encode(model, documents, config)
    expected = []
    for document, document_windows in zip(documents, encoded, strict=True):
        ends = np.cumsum(document_windows.counts)
        starts = ends - document_windows.counts
        expected += [document[a:b] for a, b in zip(starts, ends, strict=True)]
    decoded = windows.decode_each(model, np.concatenate([w.codes for w in encoded]), config)
    return float(np.mean([a == b for a, b in zip(decoded, expected, strict=True)]))
