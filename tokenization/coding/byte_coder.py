"""Byte strings to arithmetic-coded streams and back, with the probabilities of any model.

The last bits of a float model's probabilities change with anything about the computation: the batch
size, the order of a sum, the compiler's fusions. Encoding and decoding are therefore **one compiled
function**, `_run`. Every step computes the CDF, takes either the given byte or the byte
that the code points at, and narrows the intervals of an encoder and of a decoder to it. The mode is
an argument, so both modes run the same program; the wasted work is small beside any model. A stream
can be decoded wherever the same executable, batch size and order of documents are deterministic.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenization.coding import arithmetic
from tokenization.coding.next_byte import NextByteModel
from tokenization.coding.streams import to_streams, to_words

BATCH = 256
_STEPS = 1024  # at most, between two transfers to the host

Progress = Callable[[int], None]


def encode_bytes(
    model: NextByteModel,
    documents: list[bytes],
    *,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> list[bytes]:
    """Returns one stream per document: the shortest code, padded with zero bits to whole bytes.

    A document longer than `model.context` is read in pieces of that many bytes: between them the
    model is reset, the interval is not. Streams do not hold the documents' lengths.

    Args:
      model: gives the probabilities; it always runs with `batch` rows, unused ones included.
      documents: any bytes; a batch takes as long as its longest document.
      batch: `decode_bytes` needs the same if the model computes with floats.
      progress: called with the number of bytes coded since its last call.
    """
    lengths = [len(document) for document in documents]
    results: list[bytes] = [b''] * len(documents)
    for rows in _batches(lengths, batch):
        codes = _encode_rows(model, [documents[row] for row in rows], batch, progress)
        for row, code in zip(rows, codes):
            results[row] = code
    return results


def decode_bytes(
    model: NextByteModel,
    streams: list[bytes],
    lengths: list[int],
    *,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> list[bytes]:
    """Returns the documents that `encode_bytes` encoded; bits after a stream's end are ignored.

    For a model that computes with floats, pass all the streams of one call of `encode_bytes`, in
    the same order, with the same `batch`. Damaged streams decode to other bytes without an error:
    see `tokenization.coding.container` for checksums.

    Args:
      model: the model that encoded them.
      streams: one code per document.
      lengths: bytes of each document.
      batch: as given to `encode_bytes`.
      progress: called with the number of bytes decoded since its last call.

    Raises:
      ValueError: the numbers of streams and lengths differ, or a length is negative.
    """
    if len(streams) != len(lengths):
        raise ValueError(f'{len(streams)} streams and {len(lengths)} lengths; expected one each')
    if min(lengths, default=0) < 0:
        raise ValueError(f'length {min(lengths)}; expected none below 0')
    results = [b''] * len(streams)
    for rows in _batches(lengths, batch):
        codes, sizes = [streams[row] for row in rows], [lengths[row] for row in rows]
        for row, document in zip(rows, _decode_rows(model, codes, sizes, batch, progress)):
            results[row] = document
    return results


def _encode_rows(
    model: NextByteModel, documents: list[bytes], batch: int, progress: Progress | None
) -> list[bytes]:
    length_B = _padded([len(document) for document in documents], batch)
    records = []
    encoder = arithmetic.init_encoder(batch)
    words_BW = np.zeros((batch, _STEPS), np.uint32)
    decoder = arithmetic.init_decoder(batch)
    state = model.start(batch)
    fresh = model.mark(state)
    for start, steps in _parts(int(length_B.max()), model.context):
        byte_TB = np.zeros((_STEPS, batch), np.int32)
        for row, document in enumerate(documents):
            piece = np.frombuffer(document, np.uint8)[start : start + steps]
            byte_TB[: len(piece), row] = piece
        if start and start % model.context == 0:
            state = _rewind(model, state, fresh)
        state, encoder, _, _, record_TB = _run(
            model, state, encoder, decoder, byte_TB, words_BW, length_B - start, steps, False
        )
        records.append(np.asarray(record_TB)[:steps])
        _report(progress, length_B, start, steps)
    if not records:
        return [b''] * len(documents)
    base_B, range_B = np.asarray(encoder.base_B), np.asarray(encoder.range_B)
    codes, _ = to_streams(np.concatenate(records), base_B, range_B)
    return codes[: len(documents)]


def _decode_rows(
    model: NextByteModel,
    streams: list[bytes],
    lengths: list[int],
    batch: int,
    progress: Progress | None,
) -> list[bytes]:
    length_B = _padded(lengths, batch)
    words_BW = to_words(streams + [b''] * (batch - len(streams)))
    decoder = arithmetic.fill(arithmetic.init_decoder(batch), _window(words_BW, np.zeros(batch)))
    encoder = arithmetic.init_encoder(batch)
    read_B = np.full(batch, 2)
    given_TB = np.zeros((_STEPS, batch), np.int32)
    pieces = [np.zeros((0, batch), np.uint8)]
    state = model.start(batch)
    fresh = model.mark(state)
    for start, steps in _parts(int(length_B.max()), model.context):
        if start and start % model.context == 0:
            state = _rewind(model, state, fresh)
        window_BW = _window(words_BW, read_B)
        state, encoder, decoder, byte_TB, _ = _run(
            model, state, encoder, decoder, given_TB, window_BW, length_B - start, steps, True
        )
        read_B = read_B + np.asarray(decoder.read_B)
        pieces.append(np.asarray(byte_TB)[:steps].astype(np.uint8))
        _report(progress, length_B, start, steps)
    byte_BT = np.concatenate(pieces).T
    return [byte_BT[row, :length].tobytes() for row, length in enumerate(lengths)]


@functools.partial(jax.jit, static_argnames='model')
def _run(
    model: NextByteModel,
    state: Any,
    encoder: arithmetic.Encoder,
    decoder: arithmetic.Decoder,
    byte_TB: jax.Array,
    words_BW: jax.Array,
    length_B: jax.Array,
    steps: jax.Array,
    decoding: jax.Array,
) -> tuple[Any, arithmetic.Encoder, arithmetic.Decoder, jax.Array, jax.Array]:
    """Codes `steps` bytes of every row; a row idles after its next `length_B` bytes.

    Returns the states, the bytes given or decoded, and the encoder's records, both `[T, B]`.
    """

    def body(t: jax.Array, carry: Any) -> Any:
        state, encoder, decoder, byte_TB, record_TB = carry
        cdf_BV = model.cdf(state)
        found_B = arithmetic.find_symbol(decoder, cdf_BV, model.precision)
        byte_B = jnp.where(decoding, found_B, byte_TB[t])
        lower_B, upper_B = arithmetic.bounds(cdf_BV, byte_B)
        active_B = t < length_B
        narrowed, record_B = arithmetic.encode_step(encoder, lower_B, upper_B, model.precision)
        read = arithmetic.decode_step(decoder, lower_B, upper_B, words_BW, model.precision)
        return (
            model.step(state, byte_B),
            arithmetic.select(active_B, narrowed, encoder),
            arithmetic.select(active_B, read, decoder),
            byte_TB.at[t].set(byte_B),
            record_TB.at[t].set(jnp.where(active_B, record_B, 0)),
        )

    records = jnp.zeros(byte_TB.shape, jnp.uint32)
    # `words_BW` starts at the first unread word.
    decoder = arithmetic.Decoder(decoder.offset_B, decoder.range_B, jnp.zeros_like(decoder.read_B))
    return jax.lax.fori_loop(0, steps, body, (state, encoder, decoder, byte_TB, records))


@functools.partial(jax.jit, static_argnames='model')
def _rewind(model: NextByteModel, state: Any, mark: Any) -> Any:
    return model.rewind(state, mark)


def _batches(lengths: list[int], batch: int) -> Iterator[list[int]]:
    # Documents of similar length share a batch, so that few rows idle. The sort is stable, because
    # the decoder must arrive at the same batches from the same lengths.
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for first in range(0, len(order), batch):
        yield order[first : first + batch]


def _parts(length: int, context: int) -> Iterator[tuple[int, int]]:
    """Yields (start, steps) up to `length`; no part crosses a multiple of the context."""
    start = 0
    while start < length:
        steps = min(_STEPS, length - start, context - start % context)
        yield start, steps
        start += steps


def _padded(lengths: list[int], batch: int) -> np.ndarray:
    return np.array(lengths + [0] * (batch - len(lengths)), np.int32)


def _window(words_BW: np.ndarray, read_B: np.ndarray) -> np.ndarray:
    """Returns the next `_STEPS` words of each row, zeros past the end; a step reads at most one."""
    index_BW = read_B.astype(np.int64)[:, None] + np.arange(_STEPS)
    inside_BW = index_BW < words_BW.shape[1]
    if not inside_BW.any():
        return np.zeros(index_BW.shape, np.uint32)
    found_BW = np.take_along_axis(words_BW, np.where(inside_BW, index_BW, 0), axis=1)
    return np.where(inside_BW, found_BW, 0)


def _report(progress: Progress | None, length_B: np.ndarray, start: int, steps: int) -> None:
    if progress is not None:
        progress(int(np.clip(length_B.astype(np.int64) - start, 0, steps).sum()))
