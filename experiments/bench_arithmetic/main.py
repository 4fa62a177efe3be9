"""Codes the same symbols with both coders, interleaved, and compares speed and length."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments import report
from experiments.bench_arithmetic.config import Config
from tokenization.coding import arithmetic, cdf
from tokenization.coding.symbols import decode_symbols, encode_symbols

try:
    import constriction
except ImportError:  # an optional extra; its rows are omitted
    constriction = None


@dataclasses.dataclass(frozen=True)
class Case:
    """Symbols to code: `symbol_TB` is drawn from `p_TBV`, or from `p_TBV[0, 0]` if shared."""

    symbol_TB: np.ndarray
    p_TBV: np.ndarray
    precision: int

    @property
    def shared(self) -> bool:
        """Whether all symbols share one distribution."""
        return self.p_TBV.shape[:2] == (1, 1)


@dataclasses.dataclass(frozen=True)
class Side:
    """One coder on one case: `encode` returns the streams and `decode` the symbols, `[T, B]`."""

    name: str
    encode: Callable[[], list[Any]]
    decode: Callable[[list[Any]], np.ndarray]
    bits: Callable[[Any], int]
    ideal_B: np.ndarray
    symbol_TB: np.ndarray


def main(config: Config, out: epath.Path) -> dict[str, float]:
    """Prints the table and returns the flat metrics; writes no files of its own into `out`."""
    del out
    adaptive, shared = make_case(config, shared=False), make_case(config, shared=True)
    sides = [given_cdf('adaptive', adaptive), given_floats('adaptive_floats', adaptive)]
    sides += [given_cdf('shared', shared)]
    if constriction is not None:
        sides.append(given_constriction('constriction_adaptive', adaptive))
        sides.append(given_constriction('constriction_shared', shared))
    rows = measure(sides, config.repeats)
    against = {row['name']: row for row in rows}
    for row in rows:
        kind = row['name'].partition('_')[0]
        other = against.get(f'constriction_{kind}')
        if other is not None:
            row['encode_ratio'] = row['encode'] / other['encode']
            row['decode_ratio'] = row['decode'] / other['decode']
    columns = [
        report.Column('name', 'coder'),
        report.Column('encode', 'encode M/s', '.2f'),
        report.Column('decode', 'decode M/s', '.2f'),
        report.Column('encode_ratio', 'encode / constriction', '.2f'),
        report.Column('decode_ratio', 'decode / constriction', '.2f'),
        report.Column('excess_percent', 'excess %', '.3f'),
        report.Column('excess_bits', 'excess bits per stream', '.1f'),
        report.Column('worst_bits', 'worst excess beyond 0.1%', '.1f'),
    ]
    notes = [
        'M/s: million symbols per second; excess: code length above the ideal; last column: bits.',
        f'{config.streams} streams of {config.symbols} symbols out of {config.vocab_size} (shared: '
        f'{config.shared_factor} times as many); medians of {config.repeats}',
        'adaptive: one integer CDF per symbol; adaptive_floats: float32 probabilities per symbol,',
        'quantised within the measured time; shared: one integer CDF for all symbols.',
        'constriction: RangeEncoder with perfect=False, one vectorised call per stream; adaptive:',
        'float32, quantised within the measured time; shared: one model, built beforehand.',
    ]
    report.table(rows, columns, 'Arithmetic coder', notes)
    names = {
        'encode': 'encode_symbols_per_s',
        'decode': 'decode_symbols_per_s',
        'encode_ratio': 'encode_over_constriction',
        'decode_ratio': 'decode_over_constriction',
        'excess_percent': 'excess_percent',
        'excess_bits': 'excess_bits_per_stream',
        'worst_bits': 'worst_bits_beyond_0.1_percent',
    }
    scale = {'encode': 1e6, 'decode': 1e6}
    return {
        report.key(metric, row['name']): row[field] * scale.get(field, 1)
        for row in rows
        for field, metric in names.items()
        if field in row
    }


def make_case(config: Config, shared: bool) -> Case:
    """Draws random distributions, and symbols from them."""
    rng = np.random.default_rng(config.seed)
    shape = (config.symbols * (config.shared_factor if shared else 1), config.streams)
    alpha_V = np.full(config.vocab_size, config.concentration)
    p_TBV = rng.dirichlet(alpha_V, size=(1, 1) if shared else shape).astype(np.float32)
    sums_TBV = np.cumsum(p_TBV, axis=-1)
    symbol_TB = np.empty(shape, np.int32)
    for t in range(len(symbol_TB)):
        edges_BV = sums_TBV[0 if shared else t]
        draw_B1 = rng.random((config.streams, 1)) * edges_BV[:, -1:]
        symbol_TB[t] = np.sum(edges_BV <= draw_B1, axis=-1)
    return Case(np.minimum(symbol_TB, config.vocab_size - 1), p_TBV, config.precision)


def given_cdf(name: str, case: Case) -> Side:
    """Our coder, given integer CDFs; those of the decoder are on the device."""
    T, B = case.symbol_TB.shape
    cdf_TBV = cdf.quantize(case.p_TBV, case.precision)
    device_TBV = jnp.asarray(cdf_TBV)
    length_B = np.full(B, T)

    def encode() -> list[bytes]:
        lower_TB, upper_TB = bounds(cdf_TBV, case.symbol_TB)
        return encode_symbols(lower_TB, upper_TB, length_B, case.precision)[0]

    def decode(codes: list[bytes]) -> np.ndarray:
        return decode_symbols(device_TBV, codes, length_B, case.precision)

    lower_TB, upper_TB = bounds(cdf_TBV, case.symbol_TB)
    ideal_B = (case.precision - np.log2(upper_TB - lower_TB)).sum(axis=0)
    return Side(name, encode, decode, lambda code: 8 * len(code), ideal_B, case.symbol_TB)


def given_floats(name: str, case: Case) -> Side:
    """Our coder including `cdf.quantize`, which takes most of the time."""
    T, B = case.symbol_TB.shape
    length_B = np.full(B, T)
    p_TBV, symbol_TB = jnp.asarray(case.p_TBV), jnp.asarray(case.symbol_TB)
    # Encoder and decoder need identical CDFs, so both use the same compiled function.
    quantize = jax.jit(lambda p_TBV: cdf.quantize(p_TBV, case.precision))
    gather = jax.jit(jax.vmap(arithmetic.bounds))

    def encode() -> list[bytes]:
        lower_TB, upper_TB = gather(quantize(p_TBV), symbol_TB)
        return encode_symbols(lower_TB, upper_TB, length_B, case.precision)[0]

    def decode(codes: list[bytes]) -> np.ndarray:
        return decode_symbols(quantize(p_TBV), codes, length_B, case.precision)

    ideal_B = float_ideal(case)
    return Side(name, encode, decode, lambda code: 8 * len(code), ideal_B, case.symbol_TB)


def given_constriction(name: str, case: Case) -> Side:
    """`constriction` called from Python: one call with arrays per stream."""
    T, B = case.symbol_TB.shape
    queue, categorical = constriction.stream.queue, constriction.stream.model.Categorical
    symbols = [np.ascontiguousarray(symbol_T) for symbol_T in case.symbol_TB.T]
    if case.shared:
        model = categorical(case.p_TBV[0, 0], perfect=False)
        arguments: list[tuple[np.ndarray, ...]] = [()] * B
    else:
        model = categorical(perfect=False)
        arguments = [(np.ascontiguousarray(case.p_TBV[:, row]),) for row in range(B)]

    def encode() -> list[np.ndarray]:
        codes = []
        for symbol_T, argument in zip(symbols, arguments):
            encoder = queue.RangeEncoder()
            encoder.encode(symbol_T, model, *argument)
            codes.append(encoder.get_compressed())
        return codes

    def decode(codes: list[np.ndarray]) -> np.ndarray:
        rows = [
            queue.RangeDecoder(code).decode(model, *(argument or (T,)))
            for code, argument in zip(codes, arguments)
        ]
        return np.stack(rows, axis=1)

    return Side(
        name, encode, decode, lambda code: 32 * len(code), float_ideal(case), case.symbol_TB
    )


def measure(sides: list[Side], repeats: int) -> list[dict[str, Any]]:
    """Returns one row per coder; runs are interleaved, so that other load affects all alike."""
    codes = [side.encode() for side in sides]  # warm-up
    for side, code in zip(sides, codes):
        if not np.array_equal(side.decode(code), side.symbol_TB):
            raise RuntimeError(f'{side.name}: the decoded symbols differ from those encoded')
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(repeats):
        for side, code in zip(sides, codes):
            for what, run in (
                ('encode', side.encode),
                ('decode', functools.partial(side.decode, code)),
            ):
                start = time.perf_counter()
                run()
                seconds.setdefault((side.name, what), []).append(time.perf_counter() - start)
    rows = []
    for side, code in zip(sides, codes):
        bits_B = np.array([side.bits(one) for one in code])
        size = side.symbol_TB.size / 1e6
        rows.append(
            {
                'name': side.name,
                'encode': size / statistics.median(seconds[side.name, 'encode']),
                'decode': size / statistics.median(seconds[side.name, 'decode']),
                'excess_percent': 100 * float(bits_B.sum() / side.ideal_B.sum() - 1),
                'excess_bits': float(np.mean(bits_B - side.ideal_B)),
                'worst_bits': float(np.max(bits_B - 1.001 * side.ideal_B)),
            }
        )
    return rows


def bounds(cdf_TBV: np.ndarray, symbol_TB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cumulative frequencies below each symbol and including it, int32 `[T, B]`."""
    if cdf_TBV.shape[:2] == (1, 1):
        return cdf_TBV[0, 0][symbol_TB], cdf_TBV[0, 0][symbol_TB + 1]
    index_TBV = symbol_TB[..., None]
    lower_TBV = np.take_along_axis(cdf_TBV, index_TBV, axis=-1)
    upper_TBV = np.take_along_axis(cdf_TBV, index_TBV + 1, axis=-1)
    return lower_TBV[..., 0], upper_TBV[..., 0]


def float_ideal(case: Case) -> np.ndarray:
    """Returns -log2 of each stream's probability before quantisation, float64 `[B]`."""
    p_TBV = case.p_TBV.astype(np.float64)
    p_TBV = np.broadcast_to(p_TBV, (*case.symbol_TB.shape, p_TBV.shape[-1]))
    p_TB = np.take_along_axis(p_TBV, case.symbol_TB[..., None], axis=-1)[..., 0]
    return -np.log2(p_TB).sum(axis=0)
