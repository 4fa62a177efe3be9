"""An interpolated Witten-Bell byte n-gram: exact, deterministic, trained in seconds.

Let n(c, s) be the count of byte s after the context c, N(c) = sum_s n(c, s), T(c) the number of
distinct bytes seen after c, and c' the context without its oldest byte. Then

    p(s | c) = (n(c, s) + T(c) p(s | c')) / (N(c) + T(c))

and p(s | c') = 1/256 for the empty context c. In `aab`, the empty context has n(a) = 2, n(b) = 1,
N = 3 and T = 2, so that p(a) = (2 + 2/256) / 5; the context `a` has n(a, a) = n(a, b) = 1, so that
p(a | a) = (1 + 2 p(a)) / 4:

>>> aab = count([b'aab'], order=1)
>>> 2 ** aab.log2_probabilities(b'aa')
array([0.4015625 , 0.45078125])

Source: Witten and Bell, The zero-frequency problem (IEEE Trans. Inf. Theory, 1991), method C, in
the interpolated form of Chen and Goodman (1998).

Contexts form a trie, read backwards from the most recent byte. A node of level k (a context of k
bytes) has the key `parent * 256 + byte`. Keys are sorted, and a node's number is the rank of its
key, so that no order needs integers wider than 32 bits:

    level 1 keys:  byte                    'e', 'h'      -> nodes 0, 1
    level 2 keys:  node_1 * 256 + older    'he', 'th'    -> nodes 0, 1   (oldest byte first)
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable

import numpy as np
from etils import epath

from lm.files import array_files, atomic, json_fields
from tokenization.coding import ngram_model, witten_bell
from tokenization.coding.next_byte import SYMBOLS, NextByteModel

MAX_ORDER = 5
_VERSION = 1
_MOST_NODES = (1 << 24) - 1  # per level: a node and a byte make a key of 32 bits


@dataclasses.dataclass(frozen=True, eq=False)
class NGram:
    """Counts of bytes after contexts of 0 to `order` bytes; index k of each tuple is level k.

    Attributes:
      children: sorted keys of the nodes of each level, uint32; level 0 is the root alone.
      pairs: sorted keys `node * 256 + symbol` of the counts of each level, uint32.
      counts: occurrences of each pair, uint32.
    """

    children: tuple[np.ndarray, ...]
    pairs: tuple[np.ndarray, ...]
    counts: tuple[np.ndarray, ...]
    _rows: dict[int, np.ndarray] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @property
    def order(self) -> int:
        """Number of context bytes."""
        return len(self.children) - 1

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the counts, the same on every machine."""
        sha = hashlib.sha256(f'witten-bell {_VERSION} {self.order}'.encode())
        for level in zip(self.children, self.pairs, self.counts):
            for array in level:
                sha.update(f' {array.size} '.encode())
                sha.update(np.ascontiguousarray(array, '<u4').tobytes())
        return sha.hexdigest()

    def rows(self, precision: int) -> np.ndarray:
        """Returns lower bounds of the integer CDF, uint16 `[nodes of all levels, 256]`.

        Computed on the host in float64 at the first call, then cached; 512 bytes per node.
        """
        if precision not in self._rows:
            self._rows[precision] = witten_bell.lower_bounds(
                self.children, self.pairs, self.counts, precision
            )
        return self._rows[precision]

    def model(self, precision: int = 14) -> NextByteModel:
        """Returns the next-byte model, of unlimited context."""
        rows = self.rows(precision)
        # The rows are hashed too: they were computed in floats, and coders need the same integers.
        digest = hashlib.sha256(f'{self.digest} {precision}'.encode() + rows.tobytes()).hexdigest()
        return ngram_model.model(self.children, rows, precision, digest)

    def log2_probabilities(self, data: bytes, reset_every: int | None = None) -> np.ndarray:
        """Returns log2 p of every byte of one document, float64 `[len(data)]`, unquantised.

        Args:
          data: the document.
          reset_every: the context is emptied after every so many bytes; None for never.
        """
        symbols = np.frombuffer(data, np.uint8)
        p = np.full(len(symbols), 1 / SYMBOLS)
        for level, node in enumerate(self._nodes(symbols, reset_every)):
            known = np.flatnonzero(node >= 0)
            total, types = witten_bell.totals(self.pairs[level], self.counts[level])
            at = node[known]
            key = (at * SYMBOLS + symbols[known]).astype(np.uint32)
            index, found = witten_bell.find(self.pairs[level], key)
            seen = np.where(found, self.counts[level][index], 0)
            p[known] = (seen + types[at] * p[known]) / (total[at] + types[at])
        return np.log2(p)

    def bits_per_byte(self, documents: Iterable[bytes]) -> float:
        """Returns the mean of -log2 p over all bytes; NaN for no bytes."""
        bits = [self.log2_probabilities(document) for document in documents]
        size = sum(map(len, bits))
        return float(-sum(map(np.sum, bits)) / size) if size else float('nan')

    def intervals(self, data: bytes, precision: int = 14) -> tuple[np.ndarray, np.ndarray]:
        """Returns lower and upper CDF bounds of every byte of one document, int32 `[len(data)]`.

        They equal those of `model(precision)` when it reads the document byte by byte.
        """
        symbols = np.frombuffer(data, np.uint8).astype(np.int64)
        row, base = np.zeros(len(symbols), np.int64), 0
        for level, node in enumerate(self._nodes(symbols, None)):
            row = np.where(node >= 0, base + node, row)
            base += len(self.children[level])
        table = self.rows(precision)
        lower = table[row, symbols].astype(np.int32)
        above = table[row, np.minimum(symbols + 1, SYMBOLS - 1)].astype(np.int32)
        return lower, np.where(symbols + 1 < SYMBOLS, above, np.int32(1 << precision))

    def save(self, path: epath.PathLike) -> None:
        """Writes `ngram.npz` and `ngram.json` into the folder `path`."""
        arrays = {}
        for level in range(self.order + 1):
            for name in ('children', 'pairs', 'counts'):
                arrays[f'{name}_{level}'] = getattr(self, name)[level]
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        head = {'version': _VERSION, 'order': self.order, 'digest': self.digest}
        with atomic.new_folder(path) as folder:
            (folder / 'ngram.npz').write_bytes(file.getvalue())
            (folder / 'ngram.json').write_text(json.dumps(head, indent=2) + '\n')

    @classmethod
    def load(cls, path: epath.PathLike) -> 'NGram':
        """Returns the n-gram saved in the folder `path`.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: a file is damaged, or of another version.
        """
        head_file, array_file = epath.Path(path) / 'ngram.json', epath.Path(path) / 'ngram.npz'
        for file in (head_file, array_file):
            if not file.exists():
                raise FileNotFoundError(f'{file}: no such file; `NGram.save` writes it')
        head = json_fields.read(head_file)
        version, order, digest = (head.get(name) for name in ('version', 'order', 'digest'))
        if version != _VERSION:
            raise ValueError(f'{head_file}: version {version!r}, expected {_VERSION}')
        if type(order) is not int or not 1 <= order <= MAX_ORDER or not isinstance(digest, str):
            raise ValueError(f'{head_file}: damaged: order or digest; train the n-gram again')
        levels = range(order + 1)
        kinds = ('children', 'pairs', 'counts')
        names = [f'{kind}_{level}' for kind in kinds for level in levels]
        arrays = array_files.read_archive(array_file.read_bytes(), names, str(array_file))
        ngram = cls(*(tuple(arrays[f'{kind}_{level}'] for level in levels) for kind in kinds))
        found = ngram.digest
        if found != digest:
            raise ValueError(
                f'{array_file}: its digest is {found[:12]}, but {head_file.name} says '
                f'{digest[:12]}: a damaged or foreign file; train the n-gram again'
            )
        try:
            ngram.check()
        except ValueError as error:
            raise ValueError(f'{array_file}: {error}; train the n-gram again') from None
        return ngram

    def check(self) -> None:
        """Raises ValueError unless the arrays are a trie with counts, as `count` returns it."""
        parents = 1
        for level, (keys, pairs, counts) in enumerate(
            zip(self.children, self.pairs, self.counts, strict=True)
        ):
            for array in (keys, pairs, counts):
                if array.ndim != 1 or array.dtype != np.uint32:
                    raise ValueError(f'level {level}: expected uint32 vectors, got {array.dtype}')
            for array, nodes in ((keys, parents), (pairs, len(keys))):
                if np.any(array[1:] <= array[:-1]) or np.any(array >> 8 >= nodes):
                    raise ValueError(f'level {level}: keys out of order, or without a parent')
            if len(keys) > _MOST_NODES or (not level and keys.tolist() != [0]):
                raise ValueError(f'level {level}: {len(keys)} nodes are out of range')
            seen = np.bincount(pairs >> 8, minlength=len(keys))
            if counts.shape != pairs.shape or not (np.all(counts) and np.all(seen)):
                raise ValueError(f'level {level}: a context without counts')
            parents = len(keys)

    def _nodes(self, symbols: np.ndarray, reset_every: int | None) -> list[np.ndarray]:
        """Returns, per level, the node of each position's context; -1 if it was not counted."""
        position = np.arange(len(symbols))
        read = position if reset_every is None else position % reset_every
        nodes = [np.zeros(len(symbols), np.int64)]
        for level in range(1, self.order + 1):
            node = np.full(len(symbols), -1, np.int64)
            at = np.flatnonzero((nodes[-1] >= 0) & (read >= level))
            key = (nodes[-1][at] * SYMBOLS + symbols[at - level]).astype(np.uint32)
            index, found = witten_bell.find(self.children[level], key)
            node[at] = np.where(found, index, -1)
            nodes.append(node)
        return nodes


def count(documents: Iterable[bytes], order: int = 3, min_count: int = 1) -> NGram:
    """Returns the n-gram of some documents; contexts do not cross from one into the next.

    Args:
      documents: the training text, held in memory; takes about 30 bytes per byte of text.
      order: context bytes, 1 to 5.
      min_count: to save memory, contexts seen fewer times are replaced by shorter ones.

    Raises:
      ValueError: the order is out of range, there is no text, or it has too many contexts.
    """
    if not 1 <= order <= MAX_ORDER:
        raise ValueError(f'order {order}: expected 1 to {MAX_ORDER} context bytes')
    texts = [np.frombuffer(document, np.uint8) for document in documents if document]
    if not texts:
        raise ValueError('no text to count: every document is empty')
    symbols = np.concatenate(texts).astype(np.uint32)
    read = np.concatenate([np.minimum(np.arange(len(t)), order) for t in texts]).astype(np.int8)
    kept = np.ones(len(symbols), bool)  # positions whose context of this level is in the trie
    node = np.zeros(len(symbols), np.uint32)
    children, pairs, counts = [np.zeros(1, np.uint32)], [], []
    for level in range(order + 1):
        if level:
            kept[:level] = False
            kept &= read >= level
            key = (node[level:] << np.uint32(8)) | symbols[:-level]
            keys, seen = _distinct(key[kept[level:]])
            children.append(keys[seen >= min_count])
            if len(children[-1]) > _MOST_NODES:
                raise ValueError(f'{len(keys)} contexts of {level} bytes: lower the order')
            index, found = witten_bell.find(children[-1], key)
            node[level:] = index
            kept[level:] &= found
        pair, seen = _distinct(((node << np.uint32(8)) | symbols)[kept])
        pairs.append(pair)
        counts.append(seen.astype(np.uint32))
    return NGram(tuple(children), tuple(pairs), tuple(counts))


def _distinct(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct keys, sorted, and their counts."""
    ordered = np.sort(key)
    first = np.ones(len(key), bool)
    first[1:] = ordered[1:] != ordered[:-1]
    start = np.flatnonzero(first)
    return ordered[start], np.diff(start, append=len(key))
