"""Equal-Info windows over any next-byte model: text as a sequence of codes of exactly W bits.

Source: Lester et al., Training LLMs over Neurally Compressed Text (TMLR 2024), section 3.3. The
rules that end a window are in `tokenization.equal_info.rules`; the paper's own is not lossless.

    config = WindowConfig(window_bits=16)
    [windows] = encode(model, [b'some text'], config)
    [text] = decode(model, [windows.codes], [len(b'some text')], config)

With `reset='every'` each window decodes independently of the others. The last window of a document
may decode to more than the rest of the text, so decoding needs the document's length in bytes.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenization.coding.next_byte import NextByteModel
from tokenization.equal_info import rules as window_rules
from tokenization.equal_info import scan as window_scan
from tokenization.equal_info import state as window_state

WINDOW_BITS = (16, 24, 32, 64, 128)
_PERIODS = {'every': 1, 'second': 2, 'never': 0}
_STEPS = 256


@dataclasses.dataclass(frozen=True)
class WindowConfig:
    """The format, on which encoder and decoder must agree.

    Attributes:
      window_bits: W, one of 16, 24, 32, 64, 128.
      rule: 'canonical', 'delay' or 'paper', see `tokenization.equal_info.rules`.
      reset: the model is reset after 'every' window, every 'second', or 'never'.
      max_bytes: the greatest size of a window.
      batch: rows coded at once; part of the format, since the sums of float models may depend on
        it.
    """

    window_bits: int = 16
    rule: str = 'canonical'
    reset: Literal['every', 'second', 'never'] = 'every'
    max_bytes: int = 64
    batch: int = 64


class Windows(NamedTuple):
    """The windows of one document.

    Attributes:
      codes: uint8 `[windows, W / 8]`, the highest byte of each code first.
      counts: bytes of text in each window, int32 `[windows]`.
    """

    codes: np.ndarray
    counts: np.ndarray


def encode(
    model: NextByteModel,
    documents: Sequence[bytes],
    config: WindowConfig,
    *,
    steps: int = _STEPS,
) -> list[Windows]:
    """Returns the windows of each document.

    Args:
      model: gives the probabilities.
      documents: any bytes, of any lengths; they share batches in order of length.
      config: the format.
      steps: model calls between two checks for whether all rows are done; changes no result.

    Raises:
      ValueError: the config does not fit the format or the model's context, or the model gives
        a byte no frequency.
    """
    setting = _setting(model, config, max(map(len, documents), default=0))
    results: list[Windows | None] = [None] * len(documents)
    for rows in _batches([len(document) for document in documents], config.batch):
        texts = [np.frombuffer(documents[i], np.uint8) for i in rows]
        text_BL = jnp.asarray(_pad(texts, config.batch))
        length_B = jnp.asarray(_pad_1d([len(text) for text in texts], config.batch))
        fixed, window = _first(setting, config)
        calls: list[window_scan.Emitted] = []
        while bool(jnp.any(window.start_B < length_B)):
            window, emitted = window_scan.encode_steps(
                setting, fixed, window, text_BL, length_B, steps
            )
            calls.append(jax.device_get(emitted))
            if np.any(calls[-1].ended_B & (calls[-1].count_B == 0)):
                raise ValueError('the CDF of the model leaves a byte no room: not increasing')
        for b, i in enumerate(rows):
            results[i] = _windows_of(calls, b, config.window_bits)
    return [windows for windows in results if windows is not None]


def decode(
    model: NextByteModel,
    codes: Sequence[np.ndarray],
    lengths: Sequence[int],
    config: WindowConfig,
    *,
    steps: int = _STEPS,
) -> list[bytes]:
    """Returns the documents of some codes, given their lengths in bytes.

    Args:
      model, config: as given to `encode`.
      codes: per document, uint8 `[windows, W / 8]`.
      lengths: bytes of each document.
      steps: as in `encode`.

    Raises:
      ValueError: the codes of a document do not decode to its length. Under the rule 'paper', which
        is not injective, undamaged codes may raise this too.
    """
    setting = _setting(model, config, max(lengths, default=0))
    if len(codes) != len(lengths):
        raise ValueError(f'codes of {len(codes)} documents, but {len(lengths)} lengths')
    results = _decode(setting, codes, lengths, config, steps)
    for i, (text, used) in enumerate(results):
        if len(text) != lengths[i] or used != len(codes[i]):
            raise ValueError(
                f'document {i}: {used} of its {len(codes[i])} windows give {len(text)} bytes, '
                f'expected all of them to give {lengths[i]}: damaged codes, or another model'
            )
    return [text for text, _ in results]


def decode_each(
    model: NextByteModel, codes: np.ndarray, config: WindowConfig, *, steps: int = 16
) -> list[bytes]:
    """Returns the string that each code decodes to, under `reset='every'`.

    Args:
      model, config: as given to `encode`.
      codes: uint8 `[windows, W / 8]`, in any order, of any documents.
      steps: as in `encode`; few, as a row is one window long.

    Raises:
      ValueError: the model is not reset at every window.
    """
    if config.reset != 'every':
        raise ValueError(f'reset {config.reset!r}: a window decodes only with those before it')
    setting = _setting(model, config, config.max_bytes)
    lengths = [config.max_bytes] * len(codes)
    single = [codes[i : i + 1] for i in range(len(codes))]
    return [text for text, _ in _decode(setting, single, lengths, config, steps)]


def _decode(
    setting: window_state.Setting,
    codes: Sequence[np.ndarray],
    lengths: Sequence[int],
    config: WindowConfig,
    steps: int,
) -> list[tuple[bytes, int]]:
    """Returns the text of each document and the number of its windows that were read."""
    results = [(b'', 0)] * len(codes)
    for rows in _batches([len(c) for c in codes], config.batch):
        fixed, window = _first(setting, config)
        Z = window.code_BZ.shape[1]
        codes_BJZ = jnp.asarray(
            _pad([window_rules.code_limbs(np.asarray(codes[i]), Z) for i in rows], config.batch)
        )
        number_B = jnp.asarray(_pad_1d([len(codes[i]) for i in rows], config.batch))
        length_B = jnp.asarray(_pad_1d([lengths[i] for i in rows], config.batch))
        texts = np.zeros((config.batch, max(lengths[i] for i in rows)), np.uint8)
        while bool(jnp.any((window.index_B < number_B) & (window.start_B < length_B))):
            window, read = window_scan.decode_steps(
                setting, fixed, window, codes_BJZ, number_B, length_B, steps
            )
            position, byte = np.asarray(read.position_B), np.asarray(read.byte_B)
            step, row = np.nonzero(position >= 0)
            # In the order of steps: a later byte replaces one that a rewind gave back.
            texts[row, position[step, row]] = byte[step, row]
        start, index = np.asarray(window.start_B), np.asarray(window.index_B)
        for b, i in enumerate(rows):
            results[i] = (texts[b, : min(start[b], lengths[i])].tobytes(), int(index[b]))
    return results


def _setting(model: NextByteModel, config: WindowConfig, longest: int) -> window_state.Setting:
    """Returns the static arguments; raises ValueError for a config that does not fit."""
    rule = window_rules.rule_by_name(config.rule)
    if config.window_bits not in WINDOW_BITS:
        raise ValueError(f'window_bits {config.window_bits}: expected one of {WINDOW_BITS}')
    if config.window_bits < model.precision:
        raise ValueError(
            f'window_bits {config.window_bits} are fewer than the {model.precision} bits of the '
            'CDF, so a window may not hold a byte; lower the precision'
        )
    if config.reset not in _PERIODS:
        raise ValueError(f'reset {config.reset!r}: expected one of {", ".join(_PERIODS)}')
    if config.max_bytes < 1 or config.batch < 1:
        raise ValueError(
            f'max_bytes {config.max_bytes} and batch {config.batch}: expected at least 1'
        )
    period = _PERIODS[config.reset]
    read = period * config.max_bytes if period else longest
    if read > model.context:
        raise ValueError(
            f'reset {config.reset!r} lets the model read {read} bytes, but its context is '
            f'{model.context}: lower max_bytes, reset more often, or cut the documents'
        )
    return window_state.setting(model, rule, config.window_bits)


def _first(
    setting: window_state.Setting, config: WindowConfig
) -> tuple[window_state.Leaves, window_state.Window]:
    period = _PERIODS[config.reset]
    return window_state.first_window(setting, config.batch, period, config.max_bytes)


def _windows_of(calls: Sequence[window_scan.Emitted], row: int, window_bits: int) -> Windows:
    """Returns the windows of one row, from the outputs of all calls."""
    codes = [call.code_BZ[call.ended_B[:, row], row] for call in calls]
    counts = [call.count_B[call.ended_B[:, row], row] for call in calls]
    if not calls:
        return Windows(np.zeros((0, window_bits // 8), np.uint8), np.zeros(0, np.int32))
    return Windows(
        window_rules.code_bytes(np.concatenate(codes), window_bits), np.concatenate(counts)
    )


def _batches(sizes: Sequence[int], batch: int) -> Iterator[list[int]]:
    """Yields the documents of each batch, of similar sizes, so that few rows idle."""
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


def _pad(arrays: Sequence[np.ndarray], batch: int) -> np.ndarray:
    """Stacks arrays, padded to a power of two, so that few shapes are compiled."""
    size = 1 << max(6, (max(map(len, arrays)) - 1).bit_length())
    out = np.zeros((batch, size, *arrays[0].shape[1:]), arrays[0].dtype)
    for row, array in zip(out, arrays):
        row[: len(array)] = array
    return out


def _pad_1d(values: Sequence[int], batch: int) -> np.ndarray:
    return np.array([*values, *[0] * (batch - len(values))], np.int32)
