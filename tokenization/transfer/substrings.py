"""Counts of the substrings of words, which add and subtract: the pool random tokenizers draw from.

A key is a substring of at most 15 bytes, padded with zeros, and its length: 16 bytes, held as two
uint64 so that they sort as the bytes do.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import regex

from tokenization.vocabularies import spelling
from tokenization.vocabularies.patterns import GPT2_PATTERN

LONGEST = 15
STRIDE = 4
_KEY = LONGEST + 1
# The first 0, 1, ... 8 bytes of a uint64.
_FIRST = np.array([(1 << 64) - (1 << 8 * (8 - n)) for n in range(9)], np.uint64)


class Counts(NamedTuple):
    """Substrings in order, each once.

    Attributes:
      keys_N2: uint64, see above.
      weights_N: int64, occurrences times length in bytes; positive.
    """

    keys_N2: np.ndarray
    weights_N: np.ndarray

    def __len__(self) -> int:
        return len(self.weights_N)

    def strings(self, index: np.ndarray) -> list[bytes]:
        """Returns some of the substrings."""
        data = self.keys_N2[index].astype('>u8').tobytes()
        sizes = data[LONGEST::_KEY]
        return [data[_KEY * i : _KEY * i + size] for i, size in enumerate(sizes)]


def count(texts: Iterable[bytes]) -> Counts:
    """Returns the substrings of the words of some texts.

    Words are those of GPT-2's pattern, bytes of UTF-8. Within a word, substrings begin at bytes
    0, 4, 8, ... and are 1 to 15 bytes long; each weighs its length. What is not UTF-8 is passed
    over. (The released code took lengths of words as spelled in letters for bytes, where
    characters beyond ASCII count double; here a byte is a byte.)
    """
    find = regex.compile(GPT2_PATTERN).findall
    found: Counter[str] = Counter()
    for text in texts:
        for stretch, valid in spelling.stretches(text):
            if valid:
                found.update(find(stretch))
    words = [word.encode() for word in found]
    length_W = np.fromiter(map(len, words), np.int64, len(words))
    offset_W = np.cumsum(length_W) - length_W
    starts_W = -(-length_W // STRIDE)
    word_S = np.repeat(np.arange(len(words)), starts_W)
    order_S = np.arange(len(word_S)) - np.repeat(np.cumsum(starts_W) - starts_W, starts_W)
    room_S = length_W[word_S] - STRIDE * order_S
    at_S = offset_W[word_S] + STRIDE * order_S
    times_S = np.fromiter(found.values(), np.int64, len(words))[word_S]
    flat = np.frombuffer(b''.join(words) + bytes(_KEY), np.uint8)
    window_S16 = np.lib.stride_tricks.sliding_window_view(flat, _KEY)[at_S]
    whole_S2 = window_S16.view('>u8').astype(np.uint64)
    parts = []
    for length in range(1, LONGEST + 1):
        fits = room_S >= length
        mask = np.array([_FIRST[min(length, 8)], _FIRST[max(length - 8, 0)]])
        keys = whole_S2[fits] & mask
        keys[:, 1] |= np.uint64(length)
        parts.append((keys, times_S[fits] * length))
    return _grouped(parts)


def add(parts: Sequence[Counts]) -> Counts:
    """Returns the counts of all the parts' texts."""
    return _grouped([(part.keys_N2, part.weights_N) for part in parts])


def remove(counts: Counts, part: Counts) -> Counts:
    """Returns counts without those of some of their texts.

    Raises:
      ValueError: the part's texts were not among them.
    """
    left = _grouped([(counts.keys_N2, counts.weights_N), (part.keys_N2, -part.weights_N)])
    if len(left) and left.weights_N.min() < 0:
        lacking = left.strings(np.array([left.weights_N.argmin()]))[0]
        raise ValueError(f'{lacking!r} occurs more often in the part than in the whole')
    return left


def _grouped(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Counts:
    """Returns keys in order, each once, with the sum of its weights; without those of sum 0."""
    keys = np.concatenate([np.zeros((0, 2), np.uint64), *(keys for keys, _ in parts)])
    weights = np.concatenate([np.zeros(0, np.int64), *(weights for _, weights in parts)])
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    keys, weights = keys[order], weights[order]
    new = np.ones(len(keys), bool)
    new[1:] = np.any(keys[1:] != keys[:-1], axis=1)
    first = np.flatnonzero(new)
    sums = np.add.reduceat(weights, first) if len(first) else weights
    return Counts(keys[first][sums != 0], sums[sums != 0])
