"""Compiles a next-byte model into a table of strings, the Equal-Info codec.

With 16-bit windows and a model that is reset at every window, code -> string is a function of
65,536 values (`tokenization.equal_info.rules` defines codes, cells and intervals).
`compile_equal_info` tabulates it breadth-first over the live prefixes: those whose interval holds
a whole cell. From then on encoding is longest match and decoding a look-up, without the model.

`tunstall` fills a table of the same size with the most probable strings instead: starting from the
256 single bytes, it keeps adding the string s with the greatest

    p(s) = p(s_1) p(s_2 | s_1) ... p(s_n | s_1 ... s_{n-1})

(Tunstall, Synthesis of noiseless compression codes, 1967, with a model of context instead of a
memoryless source, and longest match instead of a complete tree).
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from tokenization.coding.next_byte import SYMBOLS, NextByteModel, State
from tokenization.vocabularies.longest_match import Strings
from tokenization.vocabularies.table import TableTokenizer
from tokenization.vocabularies.table_files import Compiled

CELLS = 1 << 16
_BATCHES = (64, 1024)  # rows of a model call; deep levels have few and take the small batch


class _Level(NamedTuple):
    """The J live prefixes of one length n.

    Attributes:
      texts: their bytes, uint8 `[J, n]`.
      low, size: their intervals [low, low + size) in units of 2**-(16+P), uint64 `[J]`. These have
        at most 32 bits, so that products with the CDF's 16 bits are exact.
    """

    texts: np.ndarray
    low: np.ndarray
    size: np.ndarray


def compile_equal_info(
    model: NextByteModel,
    rule: str = 'canonical',
    max_bytes: int = 64,
    bits_per_token: int = 16,
) -> TableTokenizer:
    """Returns the tokenizer whose ids are the codes of 16-bit windows.

    Its encoder takes the longest string of the table that matches. Under 'canonical' these are the
    windows of `windows.encode`, except for a document's last one. Under 'delay' a match may be
    longer than a window of the streaming rule, because the code of a prefix may recur for longer
    prefixes; both decode a code to the same string.

    A single byte without a code replaces the string of the lowest code that is never written.

    Args:
      model: read from its start for every prefix.
      rule: 'canonical' or 'delay', see `tokenization.equal_info.rules`.
      max_bytes: size of the longest string.
      bits_per_token: 16, or 8 for two ids per code.

    Raises:
      ValueError: the rule is unknown; the model's context is too short; or no code is free for a
        missing single byte.
    """
    if rule not in ('canonical', 'delay'):
        raise ValueError(f'rule {rule!r}: expected canonical or delay, which are lossless')
    _check(model, max_bytes)
    root = _Level(
        np.zeros((1, 0), np.uint8),
        np.zeros(1, np.uint64),
        np.full(1, CELLS << model.precision, np.uint64),
    )
    deepest = np.full(CELLS, -1)  # the longest string whose interval holds the cell
    first = np.full(CELLS, -1)  # the shortest string whose code is the cell
    strings: list[bytes] = []
    level = _children(model, root, max_bytes)
    while len(level.texts):
        node = len(strings) + np.arange(len(level.texts))
        start, count = _cells(level, model.precision)
        deepest[_ranges(start, count)] = np.repeat(node, count)
        code = _shortest_codes(start, count)  # distinct, as the intervals of a level are disjoint
        first[code] = np.where(first[code] < 0, node, first[code])
        strings += [text.tobytes() for text in level.texts]
        level = _children(model, level, max_bytes)
    if rule == 'canonical':
        owner, own = deepest, deepest >= 0
    else:  # a cell that is no string's code decodes to its longest string, and is never written
        owner, own = np.where(first >= 0, first, deepest), first >= 0
    owner, written = _with_single_bytes(owner, own)
    table = Strings.of([strings[node] for node in owner])
    return TableTokenizer(table, written, Compiled(bits_per_token, rule, model.digest))


def tunstall(model: NextByteModel, size: int = CELLS, max_bytes: int = 64) -> TableTokenizer:
    """Returns the tokenizer of the 256 single bytes and the most probable longer strings.

    The strings are closed under prefixes, as a prefix is at least as probable as the string. Single
    bytes come first, in order; the others follow by decreasing probability.

    Args:
      model: gives the probability of a string, read from the model's start.
      size: number of strings, 256 to 65,536.
      max_bytes: size of the longest string.

    Raises:
      ValueError: the size is out of range, or the model's context is too short.
    """
    if not SYMBOLS <= size <= CELLS:
        raise ValueError(f'size {size}: expected {SYMBOLS} to {CELLS} strings')
    _check(model, max_bytes)
    texts, p = np.zeros((1, 0), np.uint8), np.ones(1)
    strings: list[bytes] = []
    ranks = []
    best, threshold = np.zeros(0), 0.0
    while len(texts) and texts.shape[1] < max_bytes:
        parts = []
        for rows, cdf in _cdfs(model, texts, max_bytes):
            if p[rows][0] <= threshold:  # rows have decreasing p: no later one can pass
                break
            child = p[rows, None] * (np.diff(cdf) / float(1 << model.precision))
            row, byte = np.nonzero(child >= threshold)
            parts.append((_append(texts[rows][row], byte), child[row, byte]))
            best = np.concatenate([best, parts[-1][1]])
            if len(best) > size:
                best = np.partition(best, len(best) - size)[-size:]
                threshold = best.min()
        if not parts:
            break
        texts, p = (np.concatenate(part) for part in zip(*parts))
        keep = p >= (threshold if strings else 0)  # all single bytes, which come first
        order = np.flatnonzero(keep)
        strings += [text.tobytes() for text in texts[order]]
        ranks.append(p[order] if len(strings) > SYMBOLS else np.full(SYMBOLS, np.inf))
        order = order[np.argsort(-p[order], kind='stable')]
        texts, p = texts[order], p[order]
    chosen = np.argsort(-np.concatenate(ranks), kind='stable')[:size]
    table = Strings.of([strings[node] for node in chosen])
    return TableTokenizer(table, np.ones(len(table), bool), Compiled(16, 'tunstall', model.digest))


def _check(model: NextByteModel, max_bytes: int) -> None:
    if not 1 <= max_bytes <= model.context:
        raise ValueError(
            f'max_bytes {max_bytes}: expected 1 to {model.context}, the context of the model'
        )


@partial(jax.jit, static_argnames='model')
def _cdf_after(model: NextByteModel, start: State, texts: jax.Array, length: jax.Array):
    """Returns the CDF after the first `length` bytes of each row, int32 `[B, 257]`."""
    state = jax.lax.fori_loop(0, length, lambda i, state: model.step(state, texts[:, i]), start)
    return model.cdf(state)


def _cdfs(
    model: NextByteModel, texts: np.ndarray, max_bytes: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields the CDF after each of J prefixes of one length, uint64, in slices of rows.

    Each prefix is read from the start: for a model with a key-value cache, the states of all
    prefixes would not fit in memory.
    """
    J, length = texts.shape
    batch = _BATCHES[0] if _BATCHES[0] >= J else _BATCHES[1]
    state = model.start(batch)
    for start in range(0, J, batch):
        rows = slice(start, min(start + batch, J))
        padded = np.zeros((batch, max_bytes), np.int32)
        padded[: rows.stop - start, :length] = texts[rows]
        cdf = np.asarray(_cdf_after(model, state, padded, np.int32(length)))
        yield rows, cdf[: rows.stop - start].astype(np.uint64)


def _children(model: NextByteModel, level: _Level, max_bytes: int) -> _Level:
    """Returns the live prefixes that are one byte longer, up to `max_bytes`."""
    P = np.uint64(model.precision)
    if level.texts.shape[1] == max_bytes:
        return _Level(level.texts[:0], level.low[:0], level.size[:0])
    parts = []
    for rows, cdf in _cdfs(model, level.texts, max_bytes):
        bound = level.low[rows, None] + (level.size[rows, None] * cdf >> P)
        below = _Level(level.texts[:0], bound[:, :-1], np.diff(bound))
        row, byte = np.nonzero(_cells(below, model.precision)[1] > 0)
        texts = _append(level.texts[rows][row], byte)
        parts.append(_Level(texts, below.low[row, byte], below.size[row, byte]))
    return _Level(*(np.concatenate(part) for part in zip(*parts)))


def _cells(level: _Level, precision: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first cell wholly inside each interval, and the number of such cells."""
    P = np.uint64(precision)
    first = ((level.low + np.uint64((1 << precision) - 1)) >> P).astype(np.int64)
    return first, np.maximum(((level.low + level.size) >> P).astype(np.int64) - first, 0)


def _shortest_codes(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Returns the first cell of the widest aligned block in [start, start + count).

    Among equally wide blocks it is the lowest one. If 2**k <= count < 2**(k+1), the block has 2**k
    or 2**(k-1) cells.

    >>> _shortest_codes(np.array([3, 5]), np.array([6, 3]))  # of 3..8: 4..7; of 5..7: 6..7
    array([4, 6])
    """
    half = np.maximum(np.frexp(count.astype(np.float64))[1] - 2, 0)
    block, stop = (start + (1 << half) - 1) >> half, (start + count) >> half
    even = block + (block & 1)
    return np.where(even + 2 <= stop, even, block) << half


def _with_single_bytes(owner: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the string of each code, with every single byte among them, and the codes to write.

    Strings 0 to 255 are the single bytes: the interval of each holds at least one cell.

    Args:
      owner: index of the string of each code.
      own: bool, the codes that may be written for their string; of these, the lowest is.
    """
    allowed = np.flatnonzero(own)
    written = np.zeros(len(owner), bool)
    written[allowed[np.unique(owner[allowed], return_index=True)[1]]] = True
    missing = np.setdiff1d(np.arange(SYMBOLS), owner[written])
    spare = np.flatnonzero(~written)
    if len(spare) < len(missing):
        raise ValueError(
            f'{len(missing)} single bytes have no code, and only {len(spare)} codes are free: '
            'lower max_bytes'
        )
    owner = owner.copy()
    owner[spare[: len(missing)]] = missing
    written[spare[: len(missing)]] = True
    return owner, written


def _append(texts: np.ndarray, byte: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([texts, np.asarray(byte, np.uint8)[:, None]], axis=1)


def _ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Returns the concatenated ranges [start, start + count).

    >>> _ranges(np.array([5, 9]), np.array([3, 2]))
    array([ 5,  6,  7,  9, 10])
    """
    before = np.cumsum(count) - count
    return np.repeat(start - before, count) + np.arange(count.sum())
