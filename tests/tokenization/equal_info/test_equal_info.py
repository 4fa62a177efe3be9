"""The compiled codec against the streaming windows, brute force, and itself."""

import functools
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenization import toy
from tokenization import loading
from tokenization.coding import ngram
from tokenization.equal_info import compiler, windows
from tokenization.equal_info.windows import WindowConfig
from tokenization.vocabularies.longest_match import Strings
from tokenization.vocabularies.table import TableTokenizer
from tokenization.vocabularies.table_files import Compiled

MAX_BYTES = 12
TEXT = b'the cat sat on the mat. the hat that the cat had sat on.\n' * 3
COUNTS = ngram.count([TEXT], 3)
NGRAM = COUNTS.model()
TOY = toy.table_model(seed=1, precision=12)
RULES = ('canonical', 'delay', 'tunstall')


@functools.cache
def compiled(rule: str, model_name: str = 'ngram') -> TableTokenizer:
    model = {'ngram': NGRAM, 'toy': TOY}[model_name]
    if rule == 'tunstall':
        return compiler.tunstall(model, 4096, MAX_BYTES)
    return compiler.compile_equal_info(model, rule, MAX_BYTES)


any_text = st.one_of(
    st.binary(max_size=200),
    st.text('the cat.', max_size=200).map(str.encode),
    st.builds(lambda byte, n: bytes([byte]) * n, st.integers(0, 255), st.integers(0, 300)),
)


@pytest.mark.parametrize('rule', RULES)
@settings(max_examples=100, deadline=None)
@given(data=any_text)
def test_round_trip_of_any_bytes(rule, data):
    tok = compiled(rule)
    ids = tok.encode(data)
    assert ids.dtype == np.int32 and tok.decode(ids) == data
    assert b''.join(tok.token_bytes(int(i)) for i in ids) == data
    if rule != 'tunstall':
        halves = tok.in_bytes()
        pairs = halves.encode(data)
        assert len(pairs) == 2 * len(ids) and halves.decode(pairs) == data
        np.testing.assert_array_equal(pairs[::2] * 256 + pairs[1::2], ids)


def test_batches_are_the_single_calls():
    tok = compiled('canonical')
    documents = [TEXT[i : 3 * i] for i in range(20)]
    batch = tok.encode_batch(documents)
    for ids, document in zip(batch, documents):
        np.testing.assert_array_equal(ids, tok.encode(document))
    assert tok.decode_batch(batch) == documents


def test_round_trip_of_single_bytes_and_of_a_long_run():
    for rule in RULES:
        tok = compiled(rule, 'toy')
        for data in [bytes([byte]) for byte in range(256)] + [b'\x00' * 100_000]:
            assert tok.decode(tok.encode(data)) == data


@pytest.mark.parametrize('name', ['ngram', 'toy'])
def test_same_codes_as_the_streaming_encoder(name):
    model = {'ngram': NGRAM, 'toy': TOY}[name]
    documents = [toy.sample(model, 150, seed=i) for i in range(5)] + [TEXT, b'zebra \xff\x00']
    config = WindowConfig(16, 'canonical', 'every', MAX_BYTES, batch=8)
    tok = compiled('canonical', name)
    for text, (codes, counts) in zip(documents, windows.encode(model, documents, config)):
        # Only the last window may decode to more than the rest of the text.
        whole = codes[:-1].astype(np.int32) @ [256, 1]
        ids = tok.encode(text)
        np.testing.assert_array_equal(ids[: len(whole)], whole)
        assert tok.decode(ids[: len(whole)]) == text[: counts[:-1].sum()]


@pytest.mark.parametrize('rule', ['canonical', 'delay'])
def test_each_code_stands_for_what_the_streaming_decoder_says(rule):
    tok = compiled(rule, 'toy')
    rng = np.random.default_rng(0)
    cells = np.concatenate([rng.integers(0, 1 << 16, 300), np.arange(0, 1 << 16, 1 << 12)])
    codes = np.stack([cells >> 8, cells & 255], axis=1).astype(np.uint8)
    config = WindowConfig(16, rule, 'every', MAX_BYTES, batch=64)
    strings = windows.decode_each(TOY, codes, config)
    forced = {int(c) for c in np.flatnonzero(tok.written) if len(tok.strings[c]) == 1}
    for cell, string in zip(cells, strings):
        assert tok.token_bytes(int(cell)) == string or int(cell) in forced
    assert all(len(tok.strings[cell]) for cell in range(1 << 16)), 'every cell decodes'


def test_delay_writes_strings_of_the_streaming_rule_and_decodes_its_codes():
    config = WindowConfig(16, 'delay', 'every', MAX_BYTES, batch=8)
    tok = compiled('delay')
    [(codes, _)] = windows.encode(NGRAM, [TEXT], config)
    ids = codes.astype(np.int32) @ [256, 1]
    assert tok.decode(ids)[: len(TEXT)] == TEXT
    assert tok.written[ids[:-1]].all()


def test_encoding_takes_the_longest_string_at_every_place():
    tok = compiled('delay')
    strings = {tok.strings[code]: code for code in np.flatnonzero(tok.written)}
    at, expected = 0, []
    while at < len(TEXT):
        size = max(n for n in range(1, MAX_BYTES + 1) if TEXT[at : at + n] in strings)
        expected.append(strings[TEXT[at : at + size]])
        at += len(TEXT[at : at + size])
    np.testing.assert_array_equal(tok.encode(TEXT), expected)


def test_written_strings_are_distinct_and_hold_all_single_bytes():
    for name in ('ngram', 'toy'):
        for rule in RULES:
            tok = compiled(rule, name)
            written = [tok.strings[i] for i in np.flatnonzero(tok.written)]
            assert len(set(written)) == len(written)
            assert {bytes([byte]) for byte in range(256)} <= set(written)
            assert tok.compiled.model_digest == {'ngram': NGRAM, 'toy': TOY}[name].digest


def test_tunstall_holds_the_most_probable_strings():
    tok = compiled('tunstall')
    strings = [tok.strings[i] for i in range(len(tok.strings))]
    chosen = set(strings)
    assert len(chosen) == 4096 == tok.vocab_size
    assert all(string[:-1] in chosen for string in strings if len(string) > 1)
    assert strings[:256] == [bytes([byte]) for byte in range(256)]

    def probability(string: bytes) -> float:
        lower, upper = COUNTS.intervals(string)
        return float(np.prod((upper - lower) / 2**14))

    ranked = [probability(string) for string in strings[256:]]
    assert all(a >= b for a, b in itertools.pairwise(ranked))
    # No more probable extension of a chosen string by a likely byte was left out.
    for string in strings[:600]:
        for byte in b'the cat.\n':
            longer = string + bytes([byte])
            if len(longer) <= MAX_BYTES and longer not in chosen:
                assert probability(longer) <= ranked[-1]


def test_v65k_reads_half_as_many_tokens_as_v256():
    tok = compiled('canonical')
    assert tok.in_bytes().vocab_size == 256 and tok.vocab_size == 1 << 16
    assert len(tok.in_bytes().encode(TEXT)) == 2 * len(tok.encode(TEXT))


@pytest.mark.parametrize('bits', [8, 16])
def test_save_and_load(tmp_path, bits):
    tok = compiled('canonical') if bits == 16 else compiled('canonical').in_bytes()
    tok.save(tmp_path)
    again = loading.load(tmp_path)
    assert isinstance(again, TableTokenizer)
    assert (again.vocab_size, again.compiled.rule) == (tok.vocab_size, 'canonical')
    np.testing.assert_array_equal(again.encode(TEXT), tok.encode(TEXT))
    np.testing.assert_array_equal(again.strings.flat, tok.strings.flat)


def test_damaged_files_are_named(tmp_path):
    compiled('tunstall').save(tmp_path)
    file, head = tmp_path / 'table.npz', tmp_path / 'tessera.json'
    good, fields = file.read_bytes(), json.loads(head.read_text())
    for bad in (b'', good[:-9], good[:500] + b'?' + good[501:]):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=r'table\.npz'):
            loading.load(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r'table\.npz'):
        loading.load(tmp_path)
    file.write_bytes(good)
    head.write_text(json.dumps({**fields, 'version': 7}))
    with pytest.raises(ValueError, match='version 7'):
        loading.load(tmp_path)
    head.write_text(json.dumps({k: v for k, v in fields.items() if k != 'rule'}))
    with pytest.raises(ValueError, match='rule'):
        loading.load(tmp_path)


def test_bad_ids_are_named():
    tok = compiled('canonical')
    for ids, message in (
        ([5, 1 << 16], 'id 65536 at position 1'),
        ([-1], 'id -1 at position 0'),
        ([0.5], 'float64'),
        ([[1, 2]], r'\(1, 2\)'),
    ):
        with pytest.raises(ValueError, match=message):
            tok.decode(np.array(ids))
    halves = tok.in_bytes()
    with pytest.raises(ValueError, match='3 ids, an odd number'):
        halves.decode(np.array([1, 2, 3]))
    with pytest.raises(ValueError, match='id 256'):
        halves.decode(np.array([1, 256]))
    with pytest.raises(ValueError, match='id 7'):
        halves.token_bytes(7)
    with pytest.raises(ValueError, match='id 65536'):
        tok.token_bytes(1 << 16)
    assert tok.decode(np.array([])) == b'' == halves.decode(np.zeros(0, np.int32))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match='paper'):
        compiler.compile_equal_info(NGRAM, 'paper')
    with pytest.raises(ValueError, match='max_bytes 9'):
        compiler.compile_equal_info(toy.table_model(context=8), max_bytes=9)
    with pytest.raises(ValueError, match='size 255'):
        compiler.tunstall(NGRAM, 255)
    singles = Strings.of([bytes([byte]) for byte in range(255)])
    with pytest.raises(ValueError, match='single byte 255'):
        TableTokenizer(singles, np.ones(255, bool), Compiled(16, 'tunstall', ''))
