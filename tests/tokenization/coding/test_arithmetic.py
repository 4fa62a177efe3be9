"""The coder against big integers and fractions, and round trips of symbols and bytes."""

import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tokenization import toy
from tokenization.coding import arithmetic, byte_coder, cdf
from tokenization.coding.symbols import decode_symbols, encode_symbols

T, B = 40, 4  # one shape for all tests of symbols, so that each function compiles once


def reference(intervals: list[tuple[int, int]], precision: int) -> tuple[int, int]:
    """The same intervals in one integer that grows by `bits`: returns (low, size) over 2**bits."""
    low, size, bits = 0, 1 << 32, 32
    for lower, upper in intervals:
        low += size * lower >> precision
        size = (size * upper >> precision) - (size * lower >> precision)
        if size <= 1 << 16:
            low, size, bits = low << 16, size << 16, bits + 16
    return shortest(low, size, bits)


def shortest(low: int, size: int, bits: int) -> tuple[int, int]:
    """Returns (value, length) of the shortest bit string whose interval is in [low, low + size)."""
    for length in range(bits + 1):
        shift = bits - length
        value = -(-low >> shift)
        if (value + 1) << shift <= low + size:
            return value, length
    raise AssertionError('an interval of one unit is a cell')


def as_bits(stream: bytes, length: int) -> int:
    length = int(length)
    assert len(stream) == -(-length // 8)
    value = int.from_bytes(stream, 'big')
    assert value % (1 << 8 * len(stream) - length) == 0, 'padding must be zeros'
    return value >> 8 * len(stream) - length


def random_case(seed: int, V: int, precision: int, concentration: float):
    rng = np.random.default_rng(seed)
    cdf_TBV = cdf.quantize(rng.dirichlet(np.full(V, concentration), size=(T, B)), precision)
    # Half the symbols from the distribution, half uniform: improbable ones must work too.
    draw_TB = rng.integers(2**precision, size=(T, B))
    likely_TB = np.sum(cdf_TBV <= draw_TB[..., None], axis=-1) - 1
    symbol_TB = np.where(rng.random((T, B)) < 0.5, likely_TB, rng.integers(V, size=(T, B)))
    length_B = rng.integers(T + 1, size=B)
    return cdf_TBV, symbol_TB, length_B


def ends(cdf_TBV: np.ndarray, symbol_TB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    take = lambda index: np.take_along_axis(cdf_TBV, index[..., None], axis=-1)[..., 0]  # noqa: E731
    return take(symbol_TB), take(symbol_TB + 1)


@pytest.mark.parametrize('precision', [14, 16])
@pytest.mark.parametrize('concentration', [0.01, 10.0])
@pytest.mark.parametrize('seed', range(5))
def test_streams_are_those_of_big_integers_and_come_back(seed, concentration, precision):
    cdf_TBV, symbol_TB, length_B = random_case(seed, 7, precision, concentration)
    lower_TB, upper_TB = ends(cdf_TBV, symbol_TB)
    codes, bits_B = encode_symbols(lower_TB, upper_TB, length_B, precision)
    for b in range(B):
        pairs = [(int(lower_TB[t, b]), int(upper_TB[t, b])) for t in range(length_B[b])]
        assert (as_bits(codes[b], bits_B[b]), bits_B[b]) == reference(pairs, precision)
    used_TB = np.arange(T)[:, None] < length_B
    for tail in (b'', b'\xff' * 9):
        found_TB = decode_symbols(cdf_TBV, [code + tail for code in codes], length_B, precision)
        np.testing.assert_array_equal(found_TB, symbol_TB * used_TB)


@pytest.mark.parametrize('precision', [14, 16])
def test_length_is_within_two_bits_of_the_exact_probability(precision):
    """Lester et al. 2024: at most -log2 p + 2 bits, plus the loss by rounding to integers."""
    for seed in range(5):
        cdf_TBV, symbol_TB, _ = random_case(seed, 7, precision, 1.0)
        lower_TB, upper_TB = ends(cdf_TBV, symbol_TB)
        _, bits_B = encode_symbols(lower_TB, upper_TB, np.full(B, T), precision)
        for b in range(B):
            low, size = Fraction(0), Fraction(1)
            for lower, upper in zip(lower_TB[:, b].tolist(), upper_TB[:, b].tolist()):
                low += size * Fraction(lower, 2**precision)
                size *= Fraction(upper - lower, 2**precision)
            ideal = math.log2(size.denominator) - math.log2(size.numerator)
            assert ideal - 0.5 <= bits_B[b] <= ideal + 2 + 1e-3 * ideal
            # The shortest string of the exact interval, found with fractions alone.
            depth = math.ceil(ideal) + 2
            scaled = size * 2**depth
            exact = shortest_of_fraction(low * 2**depth, scaled, depth)
            assert abs(int(bits_B[b]) - exact) <= 1


def shortest_of_fraction(low: Fraction, size: Fraction, bits: int) -> int:
    for length in range(bits + 1):
        cell = Fraction(2 ** (bits - length))
        if (math.ceil(low / cell) + 1) * cell <= low + size:
            return length
    raise AssertionError


@pytest.mark.parametrize('last', [0, 2])
def test_a_carry_runs_through_a_long_row_of_ones(last):
    """The middle symbol straddles 1/2: 0x7fff ffff ... until one symbol decides on either side."""
    cdf_V = np.array([0, 2**15 - 1, 2**15 + 1, 2**16], np.int32)
    symbol_TB = np.ones((T, B), np.int64)
    symbol_TB[-1] = last
    cdf_TBV = np.broadcast_to(cdf_V, (T, B, 4))
    lower_TB, upper_TB = cdf_V[symbol_TB], cdf_V[symbol_TB + 1]
    codes, bits_B = encode_symbols(lower_TB, upper_TB, np.full(B, T), 16)
    start = b'\x7f' + b'\xff' * 60 if last == 0 else b'\x80' + b'\0' * 60
    assert codes[0].startswith(start)
    pairs = list(zip(lower_TB[:, 0].tolist(), upper_TB[:, 0].tolist()))
    assert (as_bits(codes[0], bits_B[0]), bits_B[0]) == reference(pairs, 16)
    found_TB = decode_symbols(cdf_TBV, codes, np.full(B, T), 16)
    np.testing.assert_array_equal(found_TB, symbol_TB)


@pytest.mark.parametrize('precision', [14, 16])
def test_extreme_frequencies(precision):
    """One symbol has all but 255 units: 60 of it cost a bit or two, any other costs P bits."""
    cdf_V = cdf.quantize(np.eye(256)[100], precision)
    assert cdf_V[101] - cdf_V[100] == 2**precision - 255
    symbol_TB = np.full((T, B), 100)
    symbol_TB[:, 1] = 255
    symbol_TB[::2, 2] = 0
    symbol_TB[-1, 3] = 99
    lower_TB, upper_TB = cdf_V[symbol_TB], cdf_V[symbol_TB + 1]
    codes, bits_B = encode_symbols(lower_TB, upper_TB, np.full(B, T), precision)
    assert bits_B[0] <= 2 and bits_B[1] <= precision * T + 2
    for shape in ((T, B, 257), (1, 1, 257)):
        cdf_TBV = np.broadcast_to(cdf_V, shape)
        found_TB = decode_symbols(cdf_TBV, codes, np.full(B, T), precision)
        np.testing.assert_array_equal(found_TB, symbol_TB)


def test_rows_do_not_see_each_other():
    cdf_TBV, symbol_TB, length_B = random_case(0, 7, 14, 1.0)
    lower_TB, upper_TB = ends(cdf_TBV, symbol_TB)
    codes, bits_B = encode_symbols(lower_TB, upper_TB, length_B, 14)
    order = np.array([2, 0, 3, 1])
    moved, moved_bits_B = encode_symbols(
        lower_TB[:, order], upper_TB[:, order], length_B[order], 14
    )
    assert moved == [codes[row] for row in order]
    np.testing.assert_array_equal(moved_bits_B, bits_B[order])


@pytest.mark.parametrize('V', [1, 2, 3, 255, 256, 257])
def test_both_searches_find_the_symbol(V):
    rng = np.random.default_rng(V)
    cdf_BV = jnp.asarray(cdf.quantize(rng.dirichlet(np.full(V, 0.5), size=500), 16))
    range_B = rng.integers(2**16 - 1, 2**32, size=500)
    range_B[:9] = 2**32 - 1
    offset_B = rng.integers(range_B + 1)
    offset_B[::3] = range_B[::3]
    decoder = arithmetic.Decoder(
        jnp.asarray(offset_B, jnp.uint32), jnp.asarray(range_B, jnp.uint32), jnp.zeros(500)
    )
    edge_BV = (range_B[:, None] + 1) * np.asarray(cdf_BV, np.int64) >> 16
    expected_B = np.sum(edge_BV <= offset_B[:, None], axis=-1) - 1
    for search in (arithmetic._count_below, arithmetic._bisect):
        np.testing.assert_array_equal(search(decoder, cdf_BV, 16), expected_B)


@pytest.mark.parametrize(
    ('lower', 'upper', 'length', 'message'),
    [(5, 5, 1, 'symbol 0 of row 0'), (0, 2**14 + 1, 1, 'upper'), (0, 1, 2, 'lengths from 2')],
)
def test_bad_symbols_are_refused(lower, upper, length, message):
    with pytest.raises(ValueError, match=message):
        encode_symbols(np.array([[lower]]), np.array([[upper]]), np.array([length]), 14)


MODELS = {
    'table': toy.table_model(),
    'table_16': toy.table_model(precision=16, context=50),
    'float': toy.float_model(context=70),
}
BATCH = 4


def round_trip(model, documents: list[bytes]) -> list[bytes]:
    codes = byte_coder.encode_bytes(model, documents, batch=BATCH)
    lengths = [len(document) for document in documents]
    assert byte_coder.decode_bytes(model, codes, lengths, batch=BATCH) == documents
    return codes


@pytest.mark.parametrize('name', MODELS)
def test_bytes_come_back(name):
    model = MODELS[name]
    text = toy.sample(toy.table_model(), 300)
    documents = [text[:length] for length in range(20)]
    documents += [b'', bytes(range(256)), b'\0' * 1500, b'\xff' * 70, b'\xff' * 71, text]
    round_trip(model, documents)


@pytest.mark.parametrize('name', ['table_16', 'float'])
@hypothesis.given(documents=st.lists(st.binary(max_size=80), max_size=9))
def test_any_bytes_come_back(name, documents):
    round_trip(MODELS[name], documents)


@pytest.mark.parametrize('name', MODELS)
def test_streams_do_not_depend_on_the_other_rows_or_on_what_follows_them(name):
    model = MODELS[name]
    documents = [toy.sample(toy.table_model(), 100, seed) for seed in range(BATCH)]
    codes = round_trip(model, documents)
    alone = byte_coder.encode_bytes(model, documents[:1], batch=BATCH)
    assert alone == codes[:1]
    longer = [code + b'\xa5' * 7 for code in codes]
    assert byte_coder.decode_bytes(model, longer, [100] * BATCH, batch=BATCH) == documents
    if name != 'float':
        assert round_trip(model, documents[::-1]) == codes[::-1]


def programs() -> int:
    """Returns the number of programs compiled for `byte_coder._run`, over all models."""
    return byte_coder._run._cache_size()  # type: ignore[attr-defined]


def test_one_program_codes_and_decodes():
    """The contract for float models: one program, not two that should agree."""
    model = toy.float_model(seed=1)
    before = programs()
    round_trip(model, [toy.sample(model, 1100)])
    assert programs() == before + 1


def test_bytes_cost_what_the_model_says():
    model = toy.table_model()
    text = toy.sample(model, 500)
    (code,) = byte_coder.encode_bytes(model, [text], batch=BATCH)
    cdf_JV = np.asarray(model.cdf(np.array([256, *text[:-1]])))
    symbols = np.frombuffer(text, np.uint8).astype(int)
    frequency = cdf_JV[np.arange(500), symbols + 1] - cdf_JV[np.arange(500), symbols]
    ideal = -np.log2(frequency / 2**14).sum()
    assert ideal <= 8 * len(code) <= ideal * 1.001 + 2 + 8


def test_progress_counts_every_byte():
    documents = [b'a' * 1500, b'b' * 10, b'']
    seen: list[int] = []
    codes = byte_coder.encode_bytes(MODELS['table'], documents, batch=BATCH, progress=seen.append)
    assert sum(seen) == 1510 and len(seen) == 2
    byte_coder.decode_bytes(
        MODELS['table'], codes, [1500, 10, 0], batch=BATCH, progress=seen.append
    )
    assert sum(seen) == 2 * 1510


@pytest.mark.parametrize(('lengths', 'message'), [([1, 2], 'one each'), ([-1], 'below 0')])
def test_bad_lengths_are_refused(lengths, message):
    with pytest.raises(ValueError, match=message):
        byte_coder.decode_bytes(MODELS['table'], [b''], lengths)
