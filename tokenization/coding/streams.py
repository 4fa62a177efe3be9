"""From the arithmetic coder's records of words and carries to byte streams.

A word is emitted before it is certain: later symbols may still carry into it, and the carry may
run through any number of words that are all ones. So the coder records only where carries arose,
and all of them are resolved at the end, as one sum of two big numbers:

    words                  1234 ffff ffff 0007
    carry arose after      word 2
    carries                0000 0000 0001 0000
    sum                    1235 0000 0000 0007
"""

import numpy as np

# A record, one per symbol, is a 16-bit word and two flags.
EMIT = 1 << 16  # this symbol emitted the word
CARRY = 1 << 17  # this symbol carried into the words emitted before it

_WORD = 16
_LONGEST_END = 17


def to_streams(
    record_TB: np.ndarray, base_B: np.ndarray, range_B: np.ndarray
) -> tuple[list[bytes], np.ndarray]:
    """Returns the streams of finished rows: adds the carries and appends the shortest end.

    Args:
      record_TB: uint32 `[T, B]`: the records of `arithmetic.encode_step`; 0 for idle steps.
      base_B: uint32: the last 32 bits of each row's interval, its lower end.
      range_B: uint32: the sizes of the intervals minus 1.

    Returns:
      B streams, padded with zero bits to whole bytes, and their lengths in bits, int64[B].
    """
    record_BT = np.ascontiguousarray(record_TB.T)
    emit_BT = record_BT & EMIT != 0
    words_B = emit_BT.sum(axis=1)
    end_B = np.cumsum(words_B)
    code_B, tail_B = _shortest_end(base_B.astype(np.int64), range_B.astype(np.int64))
    # The concatenated words of all rows, and the carry into each. The value of a row is below 1, so
    # no carry crosses into the row before it.
    emitted = np.flatnonzero(emit_BT)
    words = record_BT.ravel()[emitted].astype('>u2')
    carries = np.zeros_like(words)
    carried = np.flatnonzero(record_BT & CARRY != 0)
    carries[np.searchsorted(emitted, carried) - 1] = 1  # into the last word before the step
    over_B = code_B >> tail_B  # 1 where the end itself is a carry and zeros
    carries[end_B[over_B > 0] - 1] += 1
    total = int.from_bytes(words.tobytes(), 'big') + int.from_bytes(carries.tobytes(), 'big')
    data = total.to_bytes(words.nbytes, 'big')
    left_B = (code_B - (over_B << tail_B)) << (24 - tail_B)  # as the top of three bytes
    result = [
        data[2 * (end - count) : 2 * end] + left.to_bytes(3, 'big')[: (tail + 7) // 8]
        for end, count, left, tail in zip(
            end_B.tolist(), words_B.tolist(), left_B.tolist(), tail_B.tolist()
        )
    ]
    return result, words_B * _WORD + tail_B


def to_words(streams: list[bytes]) -> np.ndarray:
    """Returns the 16-bit words of B streams, uint32 `[B, W]`, zero-padded."""
    W = max(((len(stream) + 1) // 2 for stream in streams), default=0)
    padded = b''.join(stream.ljust(2 * W, b'\0') for stream in streams)
    return np.frombuffer(padded, '>u2').reshape(len(streams), W).astype(np.uint32)


def _shortest_end(low_B: np.ndarray, range_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the value and the number of the bits to append after the words.

    They are the address of the largest dyadic interval inside [low, low + range], the lowest of
    equal ones (Lester et al. 2024, section 2.2). Between words a range is at least 2**16 - 1, so 17
    bits, an interval of 2**15, always suffice. The value may be `2**number`: a carry, then zeros.
    """
    high_B = low_B + range_B + 1
    code_B, tail_B = np.zeros_like(low_B), np.full_like(low_B, -1)
    for tail in range(_LONGEST_END + 1):
        shift = 32 - tail
        first_B = -(-low_B >> shift)  # the first interval of this size that starts inside
        fits_B = (tail_B < 0) & (((first_B + 1) << shift) <= high_B)
        code_B, tail_B = np.where(fits_B, first_B, code_B), np.where(fits_B, tail, tail_B)
    return code_B, tail_B
