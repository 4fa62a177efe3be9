"""Loops over bytes, compiled by numba: importing this module takes most of a second.

So `longest_match` imports it within functions. The machine code is cached on disk; the loops hold
no Python object and release the interpreter's lock.

All indices are unsigned. A signed index may count from the end, and numba's test for that costs
more than the rest of the loop (decoding at 0.1 instead of 2.7 GB/s).
"""

import numba
import numpy as np

_U = np.uint64
# The golden ratio in 32 bits spreads keys `node * 256 + byte`, which differ in few bits.
_SPREAD = np.uint32(0x9E3779B1)
_EMPTY = np.uint32(0xFFFFFFFF)


@numba.njit(cache=True, nogil=True)
def build(keys, shift):
    """Returns a hash table of edges, uint32 `[2**(32 - shift), 2]`: key, child.

    The child of the i-th key, uint32 `parent * 256 + byte`, is node i + 1. The shift is uint32.
    """
    table = np.full((1 << (32 - np.int64(shift)), 2), _EMPTY, np.uint32)
    mask = np.uint32(len(table) - 1)
    for i in range(len(keys)):
        slot = np.uint32(keys[i] * _SPREAD) >> shift
        while table[slot, 0] != _EMPTY:
            slot = np.uint32(slot + np.uint32(1)) & mask
        table[slot, 0] = keys[i]
        table[slot, 1] = i + 1
    return table


@numba.njit(cache=True, nogil=True)
def encode(text, table, shift, tokens, first, ids):
    """Writes the ids of the longest matches into `ids`, and returns their number.

    Args:
      text: uint8 `[bytes]`.
      table, shift: from `build`.
      tokens: int32 `[nodes]`: the id of the string that ends at a node, or -1.
      first: uint32 `[256]`: the node of each single byte.
      ids: int32, at least one per byte of the text.
    """
    mask = np.uint32(len(table) - 1)
    size = _U(len(text))
    count = _U(0)
    start = _U(0)
    while start < size:
        node = first[text[start]]
        best = tokens[node]
        start += _U(1)
        at = start
        while at < size:
            key = np.uint32(node << np.uint32(8)) | np.uint32(text[at])
            slot = np.uint32(key * _SPREAD) >> shift
            found = table[slot, 0]
            while found != key and found != _EMPTY:
                slot = np.uint32(slot + np.uint32(1)) & mask
                found = table[slot, 0]
            if found == _EMPTY:
                break
            node = table[slot, 1]
            at += _U(1)
            if tokens[node] >= 0:
                best = tokens[node]
                start = at
        ids[count] = best
        count += _U(1)
    return count


@numba.njit(cache=True, nogil=True)
def decode(ids, flat, offsets, text):
    """Writes the concatenated strings of `ids` into `text`.

    Args:
      ids: int32, in range.
      flat: uint8, the strings and 7 bytes of padding, since 8 bytes are copied at a time.
      offsets: uint64 `[strings + 1]`.
      text: uint8, the size of the result and 7 bytes of padding.
    """
    end_of_text = _U(0)
    for i in range(len(ids)):
        token = _U(ids[i])
        start, end = offsets[token], offsets[token + _U(1)]
        at = end_of_text
        end_of_text += end - start
        while start < end:
            _copy_8(flat, start, text, at)
            start += _U(8)
            at += _U(8)


@numba.njit(inline='always')
def _copy_8(source, start, target, at):
    """Loads before it stores, so that the compiler merges each into one instruction."""
    a, b = source[start], source[start + _U(1)]
    c, d = source[start + _U(2)], source[start + _U(3)]
    e, f = source[start + _U(4)], source[start + _U(5)]
    g, h = source[start + _U(6)], source[start + _U(7)]
    target[at], target[at + _U(1)] = a, b
    target[at + _U(2)], target[at + _U(3)] = c, d
    target[at + _U(4)], target[at + _U(5)] = e, f
    target[at + _U(6)], target[at + _U(7)] = g, h
