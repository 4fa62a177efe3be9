"""Equal-Info windows: against Python integers, by enumeration, and round trips."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenization import toy
from tests.tokenization.equal_info.windows_reference import Reference
from tokenization.coding import cdf, ngram
from tokenization.coding.next_byte import SYMBOLS, NextByteModel
from tokenization.equal_info import windows
from tokenization.equal_info.windows import WindowConfig

RULES = ('canonical', 'delay')
RESETS = ('every', 'second', 'never')
TOY = toy.table_model(seed=1, precision=12)
NGRAM = ngram.count([b'the cat sat on the mat. the hat that the cat had sat on.\n' * 3], 3).model()
TEXTS = [b'the cat sat on the hat\n', b'', b'\x00', b'a' * 60, bytes(range(200, 256)), b'the the']


def fixed_model(weights: dict[int, float], precision: int) -> NextByteModel:
    """Order 0: the same distribution at every byte; unnamed bytes share the remaining mass."""
    p = np.full(SYMBOLS, (1 - sum(weights.values())) / (SYMBOLS - len(weights)))
    for byte, weight in weights.items():
        p[byte] = weight
    row = jnp.asarray(cdf.quantize(p, precision))
    return NextByteModel(
        start=lambda batch: jnp.zeros(batch, jnp.int32),
        cdf=lambda state: jnp.tile(row, (len(state), 1)),
        step=lambda state, byte: state + 1,
        mark=lambda state: state,
        rewind=lambda state, mark: mark,
        precision=precision,
        context=1 << 20,
        digest=f'{weights} {precision}',
    )


AB = fixed_model({ord('a'): 0.85, ord('b'): 0.1}, 12)


def as_ints(codes):
    return [int.from_bytes(code.tobytes(), 'big') for code in codes]


def round_trip(model, texts, config, steps=64):
    encoded = windows.encode(model, texts, config, steps=steps)
    for text, (codes, counts) in zip(texts, encoded):
        assert codes.shape == (len(counts), config.window_bits // 8)
        assert counts.sum() == len(text) and np.all(counts > 0)
        assert np.all(counts <= config.max_bytes)
    lengths = [len(text) for text in texts]
    codes = [each.codes for each in encoded]
    assert windows.decode(model, codes, lengths, config, steps=steps) == list(texts)
    return encoded


@pytest.mark.parametrize(
    ('model', 'rule'),
    [(TOY, 'canonical'), (NGRAM, 'canonical'), (TOY, 'delay'), (TOY, 'paper')],
    ids=['toy-canonical', 'ngram-canonical', 'toy-delay', 'toy-paper'],
)
def test_same_codes_as_python_integers(model, rule):
    texts = [*TEXTS, toy.sample(model, 50, seed=3)]
    for window_bits, reset in ((16, 'every'), (16, 'never'), (64, 'second')):
        config = WindowConfig(window_bits, rule, reset, max_bytes=24, batch=8)
        encoded = windows.encode(model, texts, config, steps=64)
        reference = Reference(model, window_bits, rule, 24)
        for text, (codes, counts) in zip(texts, encoded):
            want_codes, want_counts = reference.encode(text, reset)
            assert as_ints(codes) == want_codes
            assert counts.tolist() == want_counts


@pytest.mark.parametrize(
    ('rule', 'window_bits'),
    [*(('canonical', W) for W in windows.WINDOW_BITS), ('delay', 16), ('delay', 64)],
)
def test_round_trip_of_every_kind_of_text(rule, window_bits):
    singles = [bytes([byte]) for byte in range(0, SYMBOLS, 5 if window_bits > 16 else 1)]
    texts = [*TEXTS, *singles, toy.sample(TOY, 60), np.random.default_rng(0).bytes(60)]
    for reset in RESETS:
        config = WindowConfig(window_bits, rule, reset, max_bytes=24, batch=8)
        round_trip(TOY, texts, config)


texts = st.lists(
    st.one_of(
        st.binary(max_size=60),
        st.text('the cat', max_size=60).map(str.encode),
        st.builds(lambda byte, n: bytes([byte]) * n, st.integers(0, 255), st.integers(0, 60)),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize('rule', RULES)
@settings(max_examples=25, deadline=None)
@given(texts=texts, reset=st.sampled_from(RESETS), max_bytes=st.integers(1, 40))
def test_round_trip_of_any_bytes(rule, texts, reset, max_bytes):
    round_trip(NGRAM, texts, WindowConfig(16, rule, reset, max_bytes, batch=8))


def test_round_trip_with_a_model_of_floats_and_a_short_context():
    model = toy.float_model(context=24)
    document = [toy.sample(toy.float_model(), 60), b'x' * 60]
    config = WindowConfig(16, 'canonical', 'second', max_bytes=12, batch=8)
    round_trip(model, document, config)
    with pytest.raises(ValueError, match='context is 24'):
        windows.encode(model, document, WindowConfig(16, reset='second', max_bytes=13))
    with pytest.raises(ValueError, match='60 bytes'):
        windows.encode(model, document, WindowConfig(16, reset='never', max_bytes=12))


@pytest.mark.parametrize('rule', RULES)
def test_windows_decode_by_themselves_in_any_order(rule):
    config = WindowConfig(16, rule, 'every', max_bytes=24, batch=8)
    text = toy.sample(NGRAM, 60, seed=5)
    [(codes, counts)] = windows.encode(NGRAM, [text], config, steps=64)
    order = np.random.default_rng(0).permutation(len(codes))
    strings = windows.decode_each(NGRAM, codes[order], config, steps=64)
    ends = np.cumsum(counts)
    for i, string in zip(order, strings):
        want = text[ends[i] - counts[i] : ends[i]]
        assert string[: len(want)] == want
        assert string == want or i == len(codes) - 1  # the last one may decode to more
    with pytest.raises(ValueError, match='second'):
        windows.decode_each(NGRAM, codes, WindowConfig(16, reset='second'))


def test_the_papers_rule_is_not_injective():
    # p(a) = .85, p(b) = .1: padding with zeros makes different texts equal.
    config = WindowConfig(16, 'paper', 'every', max_bytes=64, batch=8)
    rng = np.random.default_rng(0)
    starts = [
        rng.choice([b'a', b'b'], n, p=[0.8, 0.2]).tobytes() for n in range(8, 24) for _ in range(8)
    ]
    texts = [start + more + b'b' * 12 for start in starts for more in (b'', b'a')]
    streams = [each.codes.tobytes() for each in windows.encode(AB, texts, config, steps=64)]
    clashes = [i for i in range(0, len(texts), 2) if streams[i] == streams[i + 1]]
    assert clashes, 'no two texts with one stream: the rule would be lossless here'
    one, other = texts[clashes[0]], texts[clashes[0] + 1]
    for rule in RULES:
        exact = WindowConfig(16, rule, 'every', max_bytes=64, batch=8)
        first, second = windows.encode(AB, [one, other], exact, steps=64)
        lengths = len(one), len(other)
        assert (first.codes.tobytes(), lengths[0]) != (second.codes.tobytes(), lengths[1])
        round_trip(AB, [one, other], exact)


@pytest.mark.parametrize('max_bytes', [3, 24])
def test_canonical_decodes_each_cell_to_the_longest_string(max_bytes):
    reference = Reference(TOY, 16, 'canonical', max_bytes)
    cells = np.random.default_rng(0).integers(0, 1 << 16, 40)
    codes = np.stack([cells >> 8, cells & 255], axis=1).astype(np.uint8)
    config = WindowConfig(16, 'canonical', 'every', max_bytes, batch=8)
    strings = windows.decode_each(TOY, codes, config, steps=64)
    assert strings == [reference.longest_string(int(cell)) for cell in cells]
    # The first code of a text that starts with D(v) decodes to D(v) again.
    followed = [string + b'\x07' * 3 for string in strings]
    for string, text, each in zip(strings, followed, windows.encode(TOY, followed, config)):
        first = windows.decode_each(TOY, each.codes[:1], config, steps=64)[0]
        assert first == text[: each.counts[0]] and first.startswith(string)


def test_the_papers_decoder_takes_the_longest_string_with_the_code():
    config = WindowConfig(16, 'paper', 'every', 24, batch=8)
    [(codes, _)] = windows.encode(TOY, [toy.sample(TOY, 60, seed=7)], config, steps=64)
    reference = Reference(TOY, 16, 'paper', 24)
    want = [reference.longest_string(code) for code in as_ints(codes)]
    assert windows.decode_each(TOY, codes, config, steps=64) == want


def test_batch_mates_and_steps_change_nothing():
    config = WindowConfig(16, 'canonical', 'second', max_bytes=24, batch=8)
    together = windows.encode(NGRAM, TEXTS, config, steps=64)
    for text, want in zip(TEXTS, together):
        [alone] = windows.encode(NGRAM, [text], config, steps=64)
        np.testing.assert_array_equal(alone.codes, want.codes)
    other = windows.encode(NGRAM, TEXTS * 3, config, steps=7)
    for got, want in zip(other, together * 3):
        np.testing.assert_array_equal(got.codes, want.codes)
        np.testing.assert_array_equal(got.counts, want.counts)
    codes = [each.codes for each in other]
    assert windows.decode(NGRAM, codes, [len(t) for t in TEXTS] * 3, config, steps=7) == TEXTS * 3


def test_damaged_codes_and_bad_configs_are_named():
    config = WindowConfig(16, 'canonical', 'every', max_bytes=24, batch=8)
    [each] = windows.encode(NGRAM, [TEXTS[0]], config, steps=64)
    with pytest.raises(ValueError, match='document 0'):
        windows.decode(NGRAM, [each.codes[:-1]], [len(TEXTS[0])], config, steps=64)
    with pytest.raises(ValueError, match='document 0'):
        windows.decode(NGRAM, [each.codes], [3], config, steps=64)
    assert windows.encode(NGRAM, [], config) == []
    for bad, message in (
        (WindowConfig(20), 'window_bits 20'),
        (WindowConfig(rule='best'), "'best'"),
        (WindowConfig(reset='often'), "'often'"),  # type: ignore[arg-type]
        (WindowConfig(max_bytes=0), 'max_bytes 0'),
    ):
        with pytest.raises(ValueError, match=message):
            windows.encode(NGRAM, [b'x'], bad)


def test_a_model_that_leaves_a_byte_no_room_is_refused():
    broken = AB._replace(cdf=lambda state: jnp.minimum(AB.cdf(state), 3000))
    with pytest.raises(ValueError, match='no room'):
        windows.encode(broken, [b'\xff'], WindowConfig(16, batch=8), steps=64)
