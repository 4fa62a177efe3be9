"""Greedy longest-match segmentation of text over a table of byte strings, and its inverse.

At each position the longest string of the table that matches is taken:

    strings a, b, ab, abcd    text "abcab"    segments ab, c, ab

The strings form a trie. Its edges are in one hash table of about a megabyte, so a step costs one
look-up. Where no edge continues, the walk returns to the last string that it passed ("ab" above,
after "abc" led on towards "abcd"), so the table need not be closed under prefixes.
"""

import dataclasses
import functools
import itertools

import numpy as np

_MOST_NODES = 1 << 24  # a node and a byte make a key of 32 bits


@dataclasses.dataclass(frozen=True, eq=False)
class Strings:
    """Concatenated byte strings: string i is `flat[offsets[i]:offsets[i + 1]]`.

    >>> strings = Strings.of([b'ab', b'', b'c', b'ab'])
    >>> strings[2], strings.sizes.tolist(), strings.first_of_each().tolist()
    (b'c', [2, 0, 1, 2], [True, False, True, False])

    Attributes:
      flat: uint8.
      offsets: int64 `[strings + 1]`, nondecreasing from 0 to the size of `flat`.
    """

    flat: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        """Raises ValueError for invalid offsets, which `trie_walk` would follow unchecked."""
        flat, offsets = self.flat, self.offsets
        if flat.ndim != 1 or flat.dtype != np.uint8:
            raise ValueError(f'strings: expected a vector of bytes, got {flat.dtype}{flat.shape}')
        if offsets.ndim != 1 or offsets.dtype != np.int64 or not len(offsets):
            raise ValueError(f'offsets: expected an int64 vector, got {offsets.dtype}')
        if offsets[0] or offsets[-1] != len(flat) or np.any(offsets[1:] < offsets[:-1]):
            raise ValueError(f'offsets: expected to rise from 0 to {len(flat)}')

    @classmethod
    def of(cls, strings: list[bytes]) -> 'Strings':
        """Returns the strings of a list."""
        offsets = np.zeros(len(strings) + 1, np.int64)
        np.cumsum([len(string) for string in strings], out=offsets[1:])
        return cls(np.frombuffer(b''.join(strings), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> bytes:
        return self.flat[self.offsets[i] : self.offsets[i + 1]].tobytes()

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Bytes of each string, int64 `[strings]`."""
        return np.diff(self.offsets)

    def first_of_each(self) -> np.ndarray:
        """Returns which strings are neither empty nor equal to an earlier one, bool `[strings]`."""
        data, offsets = self.flat.tobytes(), self.offsets.tolist()
        seen: dict[bytes, int] = {}
        for i, (start, end) in enumerate(itertools.pairwise(offsets)):
            seen.setdefault(data[start:end], i)
        seen.pop(b'', None)
        first = np.zeros(len(self), bool)
        first[list(seen.values())] = True
        return first

    def join(self, ids: np.ndarray) -> bytes:
        """Returns the concatenated strings of ids, int32 `[T]`, all in range."""
        from tokenization.vocabularies import trie_walk

        flat, offsets = self._for_decode
        size = int(self.sizes[ids].sum())
        text = np.empty(size + 7, np.uint8)
        trie_walk.decode(np.ascontiguousarray(ids, np.int32), flat, offsets, text)
        return text[:size].tobytes()

    @functools.cached_property
    def _for_decode(self) -> tuple[np.ndarray, np.ndarray]:
        """`flat` and `offsets` as `trie_walk.decode` needs them."""
        return np.concatenate([self.flat, np.zeros(7, np.uint8)]), self.offsets.astype(np.uint64)


@dataclasses.dataclass(frozen=True, eq=False)
class LongestMatch:
    """A trie over distinct byte strings, among them all 256 single bytes.

    Attributes:
      table: hash table of the edges, see `trie_walk.build`.
      shift: the number of low bits of a hash that are dropped, uint32.
      tokens: int32 `[nodes]`: the id of the string that ends at a node, or -1; node 0 is the root.
      first: uint32 `[256]`: the node of each single byte.
    """

    table: np.ndarray
    shift: np.uint32
    tokens: np.ndarray
    first: np.ndarray

    @classmethod
    def build(cls, strings: Strings, ids: np.ndarray) -> 'LongestMatch':
        """Returns the trie of the strings with the given ids, int `[strings to match]`.

        Raises:
          ValueError: a string is empty or a duplicate, a single byte is missing, or the trie is
            too large.
        """
        from tokenization.vocabularies import trie_walk

        start, size = strings.offsets[ids], strings.sizes[ids]
        if not np.all(size > 0):
            raise ValueError(f'string {ids[np.argmin(size)]} is empty, and would match forever')
        node = np.zeros(len(ids), np.uint32)
        at, nodes = np.arange(len(ids)), 1
        edges = []
        for depth in range(int(size.max(initial=0))):
            at = at[size[at] > depth]
            if nodes > _MOST_NODES:
                raise ValueError(f'more than {_MOST_NODES} nodes: leave out the longest strings')
            key = (node[at] << np.uint32(8)) | strings.flat[start[at] + depth]
            keys, child = np.unique(key, return_inverse=True)
            edges.append(keys)
            node[at] = nodes + child
            nodes += len(keys)
        keys = np.concatenate(edges) if edges else np.zeros(0, np.uint32)
        tokens = np.full(nodes, -1, np.int32)
        tokens[node] = ids
        if np.count_nonzero(tokens >= 0) != len(ids):
            i = ids[tokens[node] != ids][0]
            raise ValueError(f'string {i}, {strings[i]!r}, is a duplicate')
        single = np.searchsorted(edges[0], np.arange(256)) if edges else np.zeros(256, np.int64)
        first = (single + 1).astype(np.uint32)
        known = np.isin(np.arange(256), edges[0]) if edges else np.zeros(256, bool)
        known[known] = tokens[first[known]] >= 0
        if not known.all():
            raise ValueError(f'the single byte {np.argmin(known)} is missing: not all text matches')
        shift = np.uint32(32 - max(10, (4 * len(keys) - 1).bit_length()))
        return cls(trie_walk.build(keys, shift), shift, tokens, first)

    def encode(self, data: bytes) -> np.ndarray:
        """Returns the ids of the longest matches from left to right, int32 `[T]`."""
        from tokenization.vocabularies import trie_walk

        text = np.frombuffer(data, np.uint8)
        ids = np.empty(len(text), np.int32)
        count = trie_walk.encode(text, self.table, self.shift, self.tokens, self.first, ids)
        return ids[:count].copy()
