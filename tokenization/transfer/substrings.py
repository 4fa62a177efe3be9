"""Counts of the substrings of words, from which random tokenizers are drawn.

Counts of texts can be added and subtracted. A key has 16 bytes: a substring of at most 15, padded
with zeros, and its length. It is stored as two uint64, which sort like the bytes.

>>> counts = count([b'abcdef'])
>>> dict(zip(counts.strings(np.arange(4)), counts.weights_Y[:4].tolist()))
{b'a': 1, b'ab': 2, b'abc': 3, b'abcd': 4}
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
    """Distinct substrings, sorted, with weights.

    Attributes:
      keys_Y2: uint64, see the module.
      weights_Y: int64, number of occurrences times length in bytes; positive.
    """

    keys_Y2: np.ndarray
    weights_Y: np.ndarray

    def __len__(self) -> int:
        return len(self.weights_Y)

    def strings(self, index: np.ndarray) -> list[bytes]:
        """Returns the substrings at the given indices."""
        data = self.keys_Y2[index].astype('>u8').tobytes()
        sizes = data[LONGEST::_KEY]
        return [data[_KEY * i : _KEY * i + size] for i, size in enumerate(sizes)]


def count(texts: Iterable[bytes]) -> Counts:
    """Returns the weighted substrings of the words of some texts.

    Words are the UTF-8 bytes of the matches of GPT-2's pattern. Within a word, substrings begin at
    bytes 0, 4, 8, ... and are 1 to 15 bytes long; each occurrence weighs the substring's length.
    Bytes that are not UTF-8 are skipped. (The released code measures words in GPT-2's letters,
    encoded in UTF-8, in which a byte beyond ASCII counts twice; here it counts once.)
    """
    find = regex.compile(GPT2_PATTERN).findall
    found: Counter[str] = Counter()
    for text in texts:
        for stretch, valid in spelling.stretches(text):
            if valid:
                found.update(find(stretch))
    words = [word.encode() for word in found]
    length_B = np.fromiter(map(len, words), np.int64, len(words))
    offset_B = np.cumsum(length_B) - length_B
    starts_B = -(-length_B // STRIDE)
    word_Y = np.repeat(np.arange(len(words)), starts_B)
    order_Y = np.arange(len(word_Y)) - np.repeat(np.cumsum(starts_B) - starts_B, starts_B)
    room_Y = length_B[word_Y] - STRIDE * order_Y
    at_Y = offset_B[word_Y] + STRIDE * order_Y
    times_Y = np.fromiter(found.values(), np.int64, len(words))[word_Y]
    flat = np.frombuffer(b''.join(words) + bytes(_KEY), np.uint8)
    window_Y16 = np.lib.stride_tricks.sliding_window_view(flat, _KEY)[at_Y]
    whole_Y2 = window_Y16.view('>u8').astype(np.uint64)
    parts = []
    for length in range(1, LONGEST + 1):
        fits = room_Y >= length
        mask = np.array([_FIRST[min(length, 8)], _FIRST[max(length - 8, 0)]])
        keys = whole_Y2[fits] & mask
        keys[:, 1] |= np.uint64(length)
        parts.append((keys, times_Y[fits] * length))
    return _grouped(parts)


def add(parts: Sequence[Counts]) -> Counts:
    """Returns the sum of counts."""
    return _grouped([(part.keys_Y2, part.weights_Y) for part in parts])


def remove(counts: Counts, part: Counts) -> Counts:
    """Returns the difference `counts - part`.

    Raises:
      ValueError: a difference is negative: the part's texts were not counted in `counts`.
    """
    left = _grouped([(counts.keys_Y2, counts.weights_Y), (part.keys_Y2, -part.weights_Y)])
    if len(left) and left.weights_Y.min() < 0:
        lacking = left.strings(np.array([left.weights_Y.argmin()]))[0]
        raise ValueError(f'{lacking!r} occurs more often in the part than in the whole')
    return left


def _grouped(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Counts:
    """Returns distinct sorted keys with the sum of their weights, without sums of 0."""
    keys = np.concatenate([np.zeros((0, 2), np.uint64), *(keys for keys, _ in parts)])
    weights = np.concatenate([np.zeros(0, np.int64), *(weights for _, weights in parts)])
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    keys, weights = keys[order], weights[order]
    new = np.ones(len(keys), bool)
    new[1:] = np.any(keys[1:] != keys[:-1], axis=1)
    first = np.flatnonzero(new)
    sums = np.add.reduceat(weights, first) if len(first) else weights
    return Counts(keys[first][sums != 0], sums[sums != 0])
