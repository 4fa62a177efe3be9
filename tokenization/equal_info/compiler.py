"""From a next-byte model to a fixed table of strings: the compiled Equal-Info codec.

With windows of 16 bits and a model that forgets at every window, code -> string is a function of
65,536 values. `compile_equal_info` finds it once, level by level over the live prefixes, whose
interval holds a whole cell. From then on encoding is longest match and decoding a look-up, without
the model.

`tunstall` spends the same number of ids on the most probable strings instead (Tunstall, Synthesis
of noiseless compression codes, 1967, with a model of context in place of a memoryless source, and
a longest match in place of a complete tree).
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
_BATCHES = (64, 1024)  # rows of a model call: the few rows of deep levels take the small one


class _Level(NamedTuple):
    """The live prefixes of one length: their bytes uint8 `[M, n]`, and intervals [low, low + size)
    in units of 2**-(16+P), uint64 `[M]`: of 32 bits at most, times 16 of the CDF, so exact."""

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

    Its encoder takes the longest string of the table that matches. For 'canonical' these are the
    windows of `windows.encode`, but for the last one of a document. For 'delay' a match may be
    longer than what the streaming rule takes, where a code comes back on the way down to its cell;
    what a code decodes to is the same.

    A single byte that no code stands for takes over the lowest code whose string has another one.

    Args:
      model: read from its start for every prefix.
      rule: 'canonical' or 'delay', see `window_rules`.
      max_bytes: of the longest string.
      bits_per_token: 16, or 8 for two ids per code.

    Raises:
      ValueError: unknown rule; the model's context is too short; or no code is to spare for a
        missing single byte.
    """
    if rule not in ('canonical', 'delay'):
        raise ValueError(f'rule {rule!r}: expected canonical or delay, which can be decoded')
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
    """Returns the tokenizer of the most probable strings, the 256 single bytes among them.

    Closed under prefixes, as a string is less probable than its prefixes. Ids go by rank: single
    bytes first, in order, then by falling probability.

    Args:
      model: gives the probability of a string that starts a window.
      size: number of strings, 256 to 65,536.
      max_bytes: of the longest string.

    Raises:
      ValueError: the size or the model's context does not fit.
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
            if p[rows][0] <= threshold:  # rows go by falling p: all that follow are out, too
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
    """Yields the CDF after each of M prefixes of one length, some rows at a time, uint64.

    Each prefix is read from the start: states of all prefixes at once would not fit in memory for
    a model with a key-value cache.
    """
    M, length = texts.shape
    batch = _BATCHES[0] if _BATCHES[0] >= M else _BATCHES[1]
    state = model.start(batch)
    for start in range(0, M, batch):
        rows = slice(start, min(start + batch, M))
        padded = np.zeros((batch, max_bytes), np.int32)
        padded[: rows.stop - start, :length] = texts[rows]
        cdf = np.asarray(_cdf_after(model, state, padded, np.int32(length)))
        yield rows, cdf[: rows.stop - start].astype(np.uint64)


def _children(model: NextByteModel, level: _Level, max_bytes: int) -> _Level:
    """Returns the live prefixes that are one byte longer; none beyond `max_bytes`."""
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
    """Returns the first cell wholly inside each interval, and how many there are."""
    P = np.uint64(precision)
    first = ((level.low + np.uint64((1 << precision) - 1)) >> P).astype(np.int64)
    return first, np.maximum(((level.low + level.size) >> P).astype(np.int64) - first, 0)


def _shortest_codes(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Returns the first cell of the lowest of the widest aligned blocks in [start, start + count).

    Of 2**k to 2**(k+1) - 1 cells the block has 2**k, or half of that.
    """
    half = np.maximum(np.frexp(count.astype(np.float64))[1] - 2, 0)
    block, stop = (start + (1 << half) - 1) >> half, (start + count) >> half
    even = block + (block & 1)
    return np.where(even + 2 <= stop, even, block) << half


def _with_single_bytes(owner: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the string of each code, every single byte among them, and the codes to write.

    Strings 0 to 255 are the single bytes, as each has an interval of at least one cell.

    Args:
      owner: index of the string of each code.
      own: bool: codes that may be written for that string; the lowest of each string is.
    """
    may = np.flatnonzero(own)
    written = np.zeros(len(owner), bool)
    written[may[np.unique(owner[may], return_index=True)[1]]] = True
    missing = np.setdiff1d(np.arange(SYMBOLS), owner[written])
    spare = np.flatnonzero(~written)
    if len(spare) < len(missing):
        raise ValueError(
            f'{len(missing)} single bytes have no code, and only {len(spare)} codes are to spare: '
            'lower max_bytes'
        )
    owner = owner.copy()
    owner[spare[: len(missing)]] = missing
    written[spare[: len(missing)]] = True
    return owner, written


def _append(texts: np.ndarray, byte: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([texts, np.asarray(byte, np.uint8)[:, None]], axis=1)


def _ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Returns start[0], start[0] + 1, ... (count[0] of them), then the same for the others."""
    before = np.cumsum(count) - count
    return np.repeat(start - before, count) + np.arange(count.sum())
