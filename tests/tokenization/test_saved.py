"""Folders that earlier versions wrote still load, and are written again as they were.

`saved` holds one folder per kind and format, written before the kinds had rooms of their own;
`saved/expected.json` has the ids that were read then.
"""

import json
import pathlib

import numpy as np
import pytest

from tokenization import loading

SAVED = pathlib.Path(__file__).parent / 'saved'
EXPECTED = json.loads((SAVED / 'expected.json').read_text())
TEXT = b'the cat sat on the mat.\n'


def test_every_kind_is_here():
    kinds = {json.loads(file.read_text())['kind'] for file in SAVED.glob('*/tessera.json')}
    assert kinds == loading.KINDS.keys()


@pytest.mark.parametrize('name', EXPECTED)
def test_loads_and_gives_the_same_ids(name):
    tokenizer = loading.load(SAVED / name)
    assert isinstance(tokenizer, loading.KINDS[_fields(SAVED / name)['kind']])
    assert tokenizer.vocab_size == EXPECTED[name]['vocab_size']
    assert tokenizer.encode(TEXT).tolist() == EXPECTED[name]['ids']
    assert tokenizer.decode(np.array(EXPECTED[name]['ids'])) == TEXT


@pytest.mark.parametrize('name', EXPECTED)
def test_is_written_as_it_was(name, tmp_path):
    """Runs are identified by a digest of what a tokenizer saves."""
    loading.load(SAVED / name).save(tmp_path / name)
    files = [p.relative_to(SAVED) for p in (SAVED / name).rglob('*') if p.is_file()]
    again = [p.relative_to(tmp_path) for p in (tmp_path / name).rglob('*') if p.is_file()]
    assert sorted(files) == sorted(again)
    for file in files:
        if file.suffix == '.npz':  # zlib may compress otherwise
            with np.load(SAVED / file) as old, np.load(tmp_path / file) as new:
                assert old.files == new.files
                for array in old.files:
                    assert old[array].dtype == new[array].dtype
                    np.testing.assert_array_equal(old[array], new[array])
        elif file.name == 'tessera.json':
            assert _fields(SAVED / name) == _fields(tmp_path / name)
        else:
            assert (SAVED / file).read_bytes() == (tmp_path / file).read_bytes()


def test_unknown_kinds_are_named(tmp_path):
    (tmp_path / 'tessera.json').write_text('{"kind": "morse"}')
    with pytest.raises(ValueError, match="unknown tokenizer kind 'morse'; this version knows byte"):
        loading.load(tmp_path)


def _fields(folder: pathlib.Path) -> dict:
    fields = json.loads((folder / 'tessera.json').read_text())
    return {name: value for name, value in fields.items() if name != 'table_sha256'}
