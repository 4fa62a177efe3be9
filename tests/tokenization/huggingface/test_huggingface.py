"""Tokenizers of Hugging Face over bytes: lossless, the original's segmentation, clear errors."""

import json
import pickle

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from tests.tokenization.huggingface.originals import MAKERS, lines
from tokenization import loading
from tokenization.huggingface import comparison as segmentation
from tokenization.huggingface import tokenizer as huggingface
from tokenization.huggingface.tokenizer import HuggingFaceTokenizer
from tokenization.vocabularies.bpe import BPETokenizer


@pytest.fixture(scope='module')
def originals() -> dict[str, tokenizers.Tokenizer]:
    return {name: make() for name, make in MAKERS.items()}


@pytest.fixture(scope='module')
def converted(originals) -> dict[str, HuggingFaceTokenizer]:
    return {n: HuggingFaceTokenizer.from_json(o.to_str()) for n, o in originals.items()}


TRICKY = ['▁', '  ', '\n', 'def', '##a', '<0x41>', '<s>', '<tool>', 'é', 'e\u0301', '漢', ' 1']
TRICKY += ['Ġ', ' unknown']

texts = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=30).map(str.encode),
    st.lists(
        st.sampled_from(TRICKY).map(str.encode)
        | st.binary(max_size=3),
        max_size=12,
    ).map(b''.join),
)  # fmt: skip


@pytest.mark.parametrize('name', MAKERS)
@settings(max_examples=150, deadline=None)
@given(data=texts)
@example(data=b'')
@example(data=bytes(range(256)))
@example(data=' ▁<0x41><s>[UNK]▁▁ \u2003 unknown'.encode())
@example(data=b'      \t\r\n\n  x')
def test_decode_inverts_encode(converted, name, data):
    tokenizer = converted[name]
    ids = tokenizer.encode(data)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert b''.join(tokenizer.token_bytes(i) for i in ids) == data == tokenizer.decode(ids)
    size = tokenizer.vocab_size
    pieces = tokenizer.encode_piece(data)
    spelled = [tokenizer.token_bytes(i) if i < size else bytes([i - size]) for i in pieces]
    assert b''.join(spelled) == data


@pytest.mark.parametrize('name', ['byte_level', 'metaspace_bpe', 'unigram'])
def test_same_segmentation(originals, converted, name):
    documents = [*lines()[::3], 'a  b   c    d', 'x\ty', '😀 is unknown']
    if name == 'unigram':  # its trainer ends words at line breaks
        documents = [' '.join(document.split()) for document in documents]
    encoded = [document.encode() for document in documents]
    assert segmentation.same_segmentation(originals[name], converted[name], encoded) is None


REGEX = r' ?[^\s\p{L}\p{N}]+|\p{N}{1,3}|\s+(?!\S)|\s+| ?\p{L}+'
WORDS = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
PLAIN = WORDS | {'use_regex': False}


def _digits(alone):
    return {'type': 'Digits', 'individual_digits': alone}


def _punctuation(**fields):
    return {'type': 'Punctuation', **fields}


def _split(regex, behavior='Isolated', invert=False):
    return {'type': 'Split', 'pattern': {'Regex': regex}, 'behavior': behavior, 'invert': invert}


@pytest.mark.parametrize(
    'steps',
    [
        [_split(REGEX), PLAIN],  # Llama 3 and Qwen
        [_split(REGEX, 'Removed', invert=True), PLAIN],  # GPT-4, as some write it
        [_punctuation(behavior='Contiguous'), WORDS, _digits(False), _split('[0-9]{3}')],  # Falcon
        [_punctuation(behavior='MergedWithPrevious'), WORDS],
        [_punctuation(), WORDS],
        [_digits(True), WORDS],  # StarCoder
        [_split(r'\s+$'), _split(r'\s?[A-Za-z]+'), _digits(True), PLAIN],  # DeepSeek
    ],
)
def test_same_segmentation_however_words_are_split(originals, steps):
    document = json.loads(originals['byte_level'].to_str())
    document['model']['ignore_merges'] = True
    document['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': steps}
    text = json.dumps(document)
    documents = [*lines()[::9], 'if a[0]: # ... ((x)) -- 12345 67,890!?', '" ".join  (_)\n\n ']
    encoded = [document.encode() for document in documents]
    original, tokenizer = tokenizers.Tokenizer.from_str(text), HuggingFaceTokenizer.from_json(text)
    assert segmentation.same_segmentation(original, tokenizer, encoded) is None


def test_words_of_bert_after_spaces(originals, converted):
    documents = [
        ' '.join(w for w in line.split() if w.isalpha() and w.isascii()).encode()
        for line in lines()
    ]
    tokenizer = converted['word_piece']
    assert segmentation.same_segmentation(originals['word_piece'], tokenizer, documents) is None
    tokens = [tokenizer.token_bytes(i) for i in tokenizer.encode(b' return self, (self)')]
    # After a bracket there is no space: continuing pieces.
    assert (
        tokens[:5] == [b' return', b' self', b',', b' ', b'('] and b''.join(tokens[5:]) == b'self)'
    )
    assert any('no space' in repair for repair in tokenizer.repairs)


def test_a_difference_is_found_and_named(originals, converted):
    found = segmentation.same_segmentation(
        originals['byte_level'], converted['metaspace_bpe'], [b'', b'import os']
    )
    assert found is not None and found.document == 1 and found.text.startswith(b' import')
    # The original applies a normal form; the converted one does not.
    document = json.loads(originals['byte_level'].to_str()) | {'normalizer': {'type': 'NFC'}}
    text = json.dumps(document)
    tokenizer = HuggingFaceTokenizer.from_json(text)
    assert tokenizer.repairs == ('normalizer NFC left out: text is encoded as it stands',)
    found = segmentation.same_segmentation(
        tokenizers.Tokenizer.from_str(text), tokenizer, ['same e\u0301'.encode()]
    )
    assert found is not None and found.text == ' e\u0301'.encode()


def test_special_tokens_have_roles_and_no_bytes(converted):
    assert converted['metaspace_bpe'].special == {'unk': 0}
    assert converted['unigram'].special == {'unk': 0, 'eos': 2}
    assert converted['word_piece'].special == {'unk': 1, 'bos': 2, 'eos': 3}
    with pytest.raises(ValueError, match='id 2 is a special token'):
        converted['unigram'].token_bytes(2)
    assert converted['unigram'].decode(np.array([2, 2])) == b''
    # Text that looks like a special token is text.
    assert 2 not in converted['unigram'].encode(b'</s>')


def test_missing_bytes_are_added_last(originals, converted):
    for name, tokenizer in converted.items():
        size = originals[name].get_vocab_size()
        assert tokenizer.vocab_size == size + tokenizer.added_bytes
        assert bool(tokenizer.added_bytes) == any('added as' in r for r in tokenizer.repairs)
    assert converted['byte_level'].added_bytes == converted['metaspace_bpe'].added_bytes == 0
    unigram = converted['unigram']
    assert unigram.encode_piece(b'\xff') == [unigram.vocab_size + 255]
    assert unigram.token_bytes(unigram.vocab_size - 1) == b'\xff'


@pytest.mark.parametrize('name', MAKERS)
def test_saved_and_pickled(converted, name, tmp_path):
    tokenizer = converted[name]
    tokenizer.save(tmp_path / 'x')
    loaded = loading.load(tmp_path / 'x')
    assert loaded == tokenizer == pickle.loads(pickle.dumps(tokenizer))
    documents = [b'import os', '漢 é'.encode()]
    for ids, same in zip(loaded.encode_batch(documents), tokenizer.encode_batch(documents)):
        np.testing.assert_array_equal(ids, same)


def test_folder_of_a_model(originals, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no tokenizer.json, tokenizer.model or vocab'):
        huggingface.load_folder(tmp_path)
    (tmp_path / 'tokenizer.json').write_text(originals['metaspace_bpe'].to_str())
    config = {'bos_token': {'content': '<s>'}, 'eos_token': '</s>', 'pad_token': None}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    assert huggingface.load_folder(tmp_path).special == {'unk': 0, 'bos': 1, 'eos': 2}
    names = tmp_path / 'special_tokens_map.json'
    names.write_text('{"pad_token": "<none>"}')
    assert 'pad' not in huggingface.load_folder(tmp_path).special
    (tmp_path / 'tokenizer_config.json').write_text('{"bos_token": "<none>"}')
    with pytest.raises(ValueError, match="bos_token '<none>' is not in the vocabulary"):
        huggingface.load_folder(tmp_path)
    (tmp_path / 'tokenizer_config.json').write_text('{"bos_token": 3}')
    with pytest.raises(ValueError, match=r'tokenizer_config.json: bos_token: 3'):
        huggingface.load_folder(tmp_path)


def test_files_of_gpt2(originals, tmp_path):
    model = json.loads(originals['byte_level'].to_str())['model']
    (tmp_path / 'vocab.json').write_text(json.dumps(model['vocab']))
    merges = '\n'.join(' '.join(merge) for merge in model['merges'])
    (tmp_path / 'merges.txt').write_text(f'#version: 0.2\n{merges}\n')
    tokenizer = huggingface.load_folder(tmp_path)
    wanted = originals['byte_level'].encode('def main():').ids
    assert tokenizer.encode(b'def main():').tolist() == wanted
    # Qwen has the same two files, but splits words differently.
    config = tmp_path / 'tokenizer_config.json'
    config.write_text('{"tokenizer_class": "GPT2TokenizerFast"}')
    assert huggingface.load_folder(tmp_path) == tokenizer
    config.write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(
        ValueError, match=r"tokenizer_class 'Qwen2Tokenizer': .* save its tokenizer"
    ):
        huggingface.load_folder(tmp_path)


def test_table_too_small(converted):
    tokenizer = converted['unigram']
    segmentation.check_fits(tokenizer, tokenizer.vocab_size)
    with pytest.raises(ValueError, match=r'of them added for single bytes.*the table has 600 rows'):
        segmentation.check_fits(tokenizer, 600)
    with pytest.raises(ValueError, match='257 ids; the table has 256 rows'):
        tokens = (*(bytes([b]) for b in range(256)), b'ab')
        segmentation.check_fits(BPETokenizer(tokens), 256)


def test_long_runs(converted):
    for tokenizer in converted.values():
        for data in (b' ' * 300_000, b'a' * 300_000, b'\xff' * 300_000):
            assert tokenizer.decode(tokenizer.encode(data)) == data


LETTERS = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False}


def _bpe(vocab, merges=(), **fields):
    model = {'type': 'BPE', 'vocab': vocab, 'merges': list(merges)}
    return json.dumps({'model': model, 'pre_tokenizer': LEVEL, **fields})


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{', 'not a tokenizer.json'),
        ('[]', 'no object "model"'),
        (_bpe({}), 'model.vocab: expected an object .* at least one'),
        (_bpe({'a': -1}), "token 'a' has the id -1"),
        (_bpe({'a': 1 << 40}), 'too large for a file'),
        (_bpe({'a': 0, 'b': 0}), "duplicate id 0, of 'a' and 'b'"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0, "a": 1}}}', "duplicate key 'a'"),
        (_bpe({'a': 0, 'b': 1}, ['a b']), "'ab' is not in model.vocab"),
        (_bpe({'a': 0}, ['a b c']), r'merges\[0\].*expected two tokens'),
        (_bpe(LETTERS, added_tokens=[{'id': 0}]), 'expected an "id" and a "content"'),
        (_bpe(LETTERS, added_tokens=[{'id': 0, 'content': 'zz'}]), 'duplicate id 0'),
        (_bpe(LETTERS, normalizer={'type': 'Magic'}), "unknown normalizer 'Magic'"),
        (_bpe(LETTERS, pre_tokenizer={'type': 'Magic'}), 'cannot tell how'),
        (_bpe(LETTERS, pre_tokenizer=None), 'cannot tell how this BPE vocabulary spells spaces'),
        (_bpe(LETTERS, pre_tokenizer=3), 'pretokenizers: 3'),
        ('{"model": {"type": "WordLevel", "vocab": {"a": 0}}}', 'words outside the vocabulary'),
        ('{"model": {"type": "Unigram", "vocab": []}}', 'expected a list .* at least one'),
        ('{"model": {"type": "Unigram", "vocab": [["a", NaN]]}}', r'model.vocab\[0\]'),
        ('{"model": {"type": "Unigram", "vocab": [["a", 0], ["a", 0]]}}', 'duplicate'),
        ('{"model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0]]}}', 'unk_id 9'),
        (_bpe({'\ud800': 0}), 'not UTF-8'),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        HuggingFaceTokenizer.from_json(text)


def test_repairs_are_said():
    steps = [{'type': 'Digits'}, {'type': 'ByteLevel', 'add_prefix_space': True}]
    split = {'type': 'Sequence', 'pretokenizers': steps}
    tokenizer = HuggingFaceTokenizer.from_json(_bpe(LETTERS, pre_tokenizer=split))
    assert 'ByteLevel: no space is put before what follows a part of Digits' in tokenizer.repairs
    special = [{'id': 300, 'content': '<s>', 'special': True}]
    tokenizer = HuggingFaceTokenizer.from_json(_bpe(LETTERS, added_tokens=special))
    assert tokenizer.repairs == ('44 ids have no token, 256 first: never used',)
    with pytest.raises(ValueError, match='id 256'):
        tokenizer.token_bytes(256)
    few = {letter: i for letter, i in LETTERS.items() if i < 200}
    tokenizer = HuggingFaceTokenizer.from_json(_bpe({**few, '漢': 200}))
    assert "1 tokens spell no bytes, '漢' first" in tokenizer.repairs[0]
    assert '56 of the 256 single bytes have no token' in tokenizer.repairs[1]
    assert tokenizer.decode(tokenizer.encode(bytes(range(256)))) == bytes(range(256))
