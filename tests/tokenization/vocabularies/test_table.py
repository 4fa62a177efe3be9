"""Longest match over any vocabulary, and extended vocabularies."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenization import loading
from tokenization.vocabularies.bpe import BPETokenizer
from tokenization.vocabularies.byte import ByteTokenizer
from tokenization.vocabularies.extension import extended_vocabulary
from tokenization.vocabularies.table import TableTokenizer
from tokenization.vocabularies.table_files import Compiled

SINGLES = [bytes([byte]) for byte in range(256)]
# Special ids, and two ids with the same bytes.
TABLE = TableTokenizer.of([b'', b'the', *SINGLES, b'', b' the', b'the', b' then', b'\xff\xfe'])
TEXT = b'the cat and then the other cat, the cats; then the end\n' * 3


@given(st.lists(st.one_of(st.sampled_from([b' the', b' then', b'n', b'\xff\xfe']), st.binary())))
def test_round_trip(parts):
    data = b''.join(parts)
    ids = TABLE.encode(data)
    assert TABLE.decode(ids) == data
    assert not np.isin(ids, [0, 258, 260]).any()  # special, and the second of two
    longest = max(
        TABLE.strings[i] for i in range(TABLE.vocab_size) if data.startswith(TABLE.strings[i])
    )
    assert not data or TABLE.token_bytes(ids[0]) == longest


def test_saved_and_loaded(tmp_path):
    TABLE.save(tmp_path / 'table')
    loaded = loading.load(tmp_path / 'table')
    assert isinstance(loaded, TableTokenizer) and loaded.vocab_size == TABLE.vocab_size
    np.testing.assert_array_equal(loaded.encode(TEXT), TABLE.encode(TEXT))
    assert [loaded.token_bytes(i) for i in (0, 1, 258, 261)] == [b'', b'the', b'', b' then']


def test_a_table_that_would_be_read_back_as_another_is_not_saved(tmp_path):
    second = TABLE.written.copy()
    second[[1, 260]] = False, True  # the second id of the same bytes
    table = TableTokenizer(TABLE.strings, second)
    assert table.encode(b'the').tolist() == [260]
    with pytest.raises(ValueError, match='expected the lowest id'):
        table.save(tmp_path / 'table')
    assert not (tmp_path / 'table').exists()


@pytest.mark.parametrize('name', ['strings.bin', 'sizes.bin'])
def test_damaged_files_are_refused(tmp_path, name):
    TABLE.save(tmp_path / 'table')
    file = tmp_path / 'table' / name
    whole = file.read_bytes()
    for damaged in (b'', whole[:-1], whole + b'1234', whole[8:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match='SHA-256 differs'):
            TableTokenizer.load(tmp_path / 'table')
        # written by an attacker who fixes the digest
        folder = tmp_path / 'table'
        content = (folder / 'sizes.bin').read_bytes() + (folder / 'strings.bin').read_bytes()
        forged = {'kind': 'string_table', 'sha256': hashlib.sha256(content).hexdigest()}
        (folder / 'tessera.json').write_text(json.dumps(forged))
        with pytest.raises(ValueError, match=r'multiple of 4|the sizes are|single byte'):
            TableTokenizer.load(tmp_path / 'table')
    file.unlink()
    with pytest.raises(FileNotFoundError, match=name):
        TableTokenizer.load(tmp_path / 'table')


def test_single_bytes_must_be_there():
    with pytest.raises(ValueError, match='the single byte 7 has no id'):
        TableTokenizer.of([byte for byte in SINGLES if byte != b'\x07'])


def test_ids_of_8_bits_are_for_compiled_tables_of_65536_codes():
    with pytest.raises(ValueError, match='only the codes of a compiled table'):
        TABLE.in_bytes()
    compiled = TableTokenizer(TABLE.strings, TABLE.written, Compiled(16, 'tunstall', 'x'))
    with pytest.raises(ValueError, match='263 codes: tokens of 8 bits need all 65536'):
        compiled.in_bytes()
    with pytest.raises(ValueError, match='bits_per_token 9'):
        TableTokenizer(TABLE.strings, TABLE.written, Compiled(9, 'tunstall', 'x'))
    with pytest.raises(ValueError, match=r'expected bool \[263\]'):
        TableTokenizer(TABLE.strings, TABLE.written[1:])


def test_an_extended_vocabulary_keeps_ids_and_ends_with_whole_words():
    base = BPETokenizer.train([TEXT], 260)
    table = extended_vocabulary(base, [TEXT, b'\xff\xfe', b''], 10_000)
    assert [table.token_bytes(i) for i in range(base.vocab_size)] == list(base.tokens)
    words = [b'the', b' cat', b' cats', b' and', b' then', b' other', b' end', b';', b'\n']
    assert all(len(table.encode(word)) == 1 for word in words)
    new = [table.token_bytes(i) for i in range(base.vocab_size, table.vocab_size)]
    assert len(new) == len(set(new) - set(base.tokens)) > 5
    assert all(b' ' not in token[1:] and token in TEXT for token in new)
    # the most frequent come first: a smaller vocabulary is a prefix of a larger one
    smaller = extended_vocabulary(base, [TEXT], base.vocab_size + 3)
    assert [smaller.token_bytes(base.vocab_size + i) for i in range(3)] == new[:3]
    assert extended_vocabulary(base, [TEXT], base.vocab_size).vocab_size == base.vocab_size
    with pytest.raises(ValueError, match='size 259: the vocabulary to extend has 260'):
        extended_vocabulary(base, [TEXT], 259)


def test_extending_bytes_is_training_from_the_start():
    # no two pairs are equally frequent at any time
    words = [b'az', b'by', b'cx', b'dw', b'azby']
    text = b''.join((word + b'\n') * 3**i for i, word in enumerate(words[:4])) + b'azby\n' * 2
    table = extended_vocabulary(ByteTokenizer(), [text], 261)
    trained = BPETokenizer.train([text], 261)
    tokens = {table.token_bytes(i) for i in range(table.vocab_size)}
    assert tokens == set(trained.tokens) == {*SINGLES, *words}
