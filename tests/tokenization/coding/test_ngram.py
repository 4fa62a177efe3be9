"""The n-gram against Witten-Bell in fractions, and its numpy and jit paths against each other."""

from collections import Counter
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenization.coding import cdf, ngram

DOCUMENTS = [b'the cat sat on the mat\n', b'\x00\xff\x00\xff', b'', b'the hat, the bat', b'q']
UNSEEN = [b'the ', b'zzz', b'', b'\xff\x00\xff', b't', b'cathe mat sat the hat\x00\xff\x00']


def brute_force(documents: list[bytes], order: int, context: bytes) -> list[Fraction]:
    """Witten-Bell for one context, straight from the recursion."""
    if len(context) > order:
        context = context[-order:]
    lower = [Fraction(1, 256)] * 256
    for size in range(len(context) + 1):
        suffix = context[len(context) - size :]
        seen = Counter(
            document[i]
            for document in documents
            for i in range(size, len(document))
            if document[i - size : i] == suffix
        )
        total, types = sum(seen.values()), len(seen)
        if not total:
            break
        lower = [(seen[s] + types * lower[s]) / Fraction(total + types) for s in range(256)]
    return lower


@pytest.mark.parametrize('order', [1, 2, 3, 5])
def test_probabilities_are_witten_bell(order):
    model = ngram.count(DOCUMENTS, order)
    for text in DOCUMENTS + UNSEEN:
        got = model.log2_probabilities(text)
        want = [float(brute_force(DOCUMENTS, order, text[:i])[s]) for i, s in enumerate(text)]
        np.testing.assert_allclose(2.0**got, want, rtol=1e-12)


def test_rows_are_the_quantised_distributions():
    model = ngram.count(DOCUMENTS, 2).model(precision=12)
    contexts = [b'', b't', b'th', b'the', b'ez', b'\x00\xff', b'zz']
    state = model.start(len(contexts))
    longest = max(map(len, contexts))
    rows = []
    for i in range(longest + 1):
        rows.append(np.asarray(model.cdf(state)))
        byte = [c[i] if i < len(c) else 0 for c in contexts]
        state = model.step(state, jnp.array(byte, jnp.int32))
    for b, context in enumerate(contexts):
        exact = brute_force(DOCUMENTS, 2, context)
        assert sum(exact) == 1
        p = np.array([float(x) for x in exact])
        row = rows[len(context)][b]
        assert row[0] == 0 and row[-1] == 1 << 12 and np.all(np.diff(row) > 0)
        # Float sums may differ in the last bit, which may move a bound by one unit.
        assert np.abs(row - cdf.quantize(p, 12)).max() <= 1


def test_contexts_end_with_the_document():
    apart, joined = ngram.count([b'ab', b'cd'], 2), ngram.count([b'abcd'], 2)
    assert apart.log2_probabilities(b'bc')[1] < joined.log2_probabilities(b'bc')[1]


def test_jit_and_numpy_agree_exactly():
    counted = ngram.count(DOCUMENTS, 3)
    model = counted.model(14)
    text = b'the hat sat on \xff\x00\xff the cat zzz the'

    @jax.jit
    def read(state, text_L):
        def body(state, byte):
            return model.step(state, byte[None]), model.cdf(state)[0]

        return jax.lax.scan(body, state, text_L)[1]

    rows = np.asarray(read(model.start(1), jnp.array(list(text), jnp.int32)))
    lower, upper = counted.intervals(text, 14)
    at = np.arange(len(text))
    np.testing.assert_array_equal(lower, rows[at, list(text)])
    np.testing.assert_array_equal(upper, rows[at, np.array(list(text)) + 1])


def test_mark_and_rewind():
    model = ngram.count(DOCUMENTS, 2).model()
    state = model.step(model.start(3), jnp.array([116, 104, 0]))
    mark = model.mark(state)
    later = model.step(state, jnp.array([104, 101, 255]))
    np.testing.assert_array_equal(model.cdf(model.rewind(later, mark)), model.cdf(state))


def test_reset_every_forgets_the_context():
    model = ngram.count(DOCUMENTS, 3)
    text = DOCUMENTS[0]
    whole = model.log2_probabilities(text, reset_every=5)
    parts = [model.log2_probabilities(text[i : i + 5]) for i in range(0, len(text), 5)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert model.bits_per_byte([text]) < -whole.mean()


def test_min_count_drops_rare_contexts():
    full, small = ngram.count(DOCUMENTS, 3), ngram.count(DOCUMENTS, 3, min_count=2)
    assert len(small.children[3]) < len(full.children[3])
    np.testing.assert_array_equal(full.log2_probabilities(b'the'), small.log2_probabilities(b'the'))
    row = small.rows(14)[np.array([0, -1])].astype(int)
    assert np.all(np.diff(row) > 0)


def test_save_and_load_are_exact(tmp_path):
    model = ngram.count(DOCUMENTS, 3)
    model.save(tmp_path)
    again = ngram.NGram.load(tmp_path)
    assert again.digest == model.digest != ngram.count(DOCUMENTS, 2).digest
    assert again.model().digest == model.model().digest != model.model(16).digest
    np.testing.assert_array_equal(again.rows(14), model.rows(14))


def test_damaged_files_are_named(tmp_path):
    ngram.count(DOCUMENTS, 2).save(tmp_path)
    good = (tmp_path / 'ngram.npz').read_bytes()
    for bad in (b'', good[: len(good) // 2], good[:200] + b'?' + good[201:], b'PK' + bytes(100)):
        (tmp_path / 'ngram.npz').write_bytes(bad)
        with pytest.raises(ValueError, match=r'ngram\.npz'):
            ngram.NGram.load(tmp_path)
    (tmp_path / 'ngram.npz').write_bytes(good)
    (tmp_path / 'ngram.json').write_text('{"version": 99, "order": 2, "digest": ""}')
    with pytest.raises(ValueError, match='version 99'):
        ngram.NGram.load(tmp_path)
    (tmp_path / 'ngram.json').unlink()
    with pytest.raises(FileNotFoundError, match=r'ngram\.json'):
        ngram.NGram.load(tmp_path)


def test_bad_arguments():
    with pytest.raises(ValueError, match='order 6'):
        ngram.count([b'abc'], 6)
    with pytest.raises(ValueError, match='empty'):
        ngram.count([b'', b''])
