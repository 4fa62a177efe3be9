"""SentencePiece files: the library's own ids of some texts, and damaged files."""

import json
import pathlib

import pytest
import tokenizers

from tests.tokenization.huggingface.originals import CONTROL, NORMAL, UNKNOWN, field, write
from tokenization.huggingface import comparison as segmentation
from tokenization.huggingface import sentencepiece
from tokenization.huggingface import tokenizer as huggingface
from tokenization.huggingface.tokenizer import HuggingFaceTokenizer

FOLDER = pathlib.Path(__file__).parent / 'sentencepiece'
FEW = [('<unk>', 0.0, UNKNOWN), ('<s>', 0.0, CONTROL), ('</s>', 0.0, CONTROL),
       ('▁', -1.0, NORMAL), ('a', -2.0, NORMAL), ('b', -3.0, NORMAL)]  # fmt: skip


def own_ids(tokenizer: HuggingFaceTokenizer, text: str) -> list[int]:
    """Returns SentencePiece's ids: one unknown token for a run of added bytes."""
    ids = tokenizer.encode(tokenizer.prefixed(text.encode())).tolist()
    size = tokenizer.vocab_size - tokenizer.added_bytes
    return segmentation._once([-1 if i >= size else i for i in ids])


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_ids_are_those_of_sentencepiece(kind, tmp_path):
    (tmp_path / 'tokenizer.model').write_bytes((FOLDER / f'{kind}.model').read_bytes())
    tokenizer = huggingface.load_folder(tmp_path)
    expected = json.loads((FOLDER / 'expected.json').read_text())
    for text, ids in zip(expected['texts'], expected[kind]):
        assert own_ids(tokenizer, text) == [-1 if i == 0 else i for i in ids], text
        assert tokenizer.decode(tokenizer.encode(text.encode())) == text.encode()
    assert tokenizer.special == {'unk': 0, 'bos': 1, 'eos': 2}
    assert (tokenizer.added_bytes > 0) == (kind == 'unigram')


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_the_json_is_one_that_tokenizers_reads(kind):
    text = sentencepiece.to_json((FOLDER / f'{kind}.model').read_bytes(), {})
    tokenizer = HuggingFaceTokenizer.from_json(text)
    original = tokenizers.Tokenizer.from_str(text)
    documents = ['Hello world', ' two  spaces', 'naïve façade'.title(), '漢']
    assert (
        segmentation.same_segmentation(original, tokenizer, [d.encode() for d in documents]) is None
    )
    # A prompt gets <s> but no </s>, and decodes to the text.
    ids = original.encode('Hello, two  words').ids
    assert ids[0] == 1 and 2 not in ids
    assert original.decode(ids) == 'Hello, two  words'


def test_the_best_piece_is_merged_first():
    pieces = [*FEW, ('ab', -1.0, NORMAL), ('ba', -0.5, NORMAL), ('aba', -4.0, NORMAL)]
    tokenizer = HuggingFaceTokenizer.from_json(sentencepiece.to_json(write(pieces), {}))
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode(b'abab')] == [b'aba', b'b']
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode(b'abb')] == [b'ab', b'b']
    assert tokenizer.encode_piece(b'aba') == [8]


def test_tokens_beside_the_model(tmp_path):
    (tmp_path / 'tokenizer.model').write_bytes(write(FEW, trainer=field(41, -1)))
    (tmp_path / 'added_tokens.json').write_text('{"<pad>": 6}')
    (tmp_path / 'special_tokens_map.json').write_text('{"pad_token": "<pad>"}')
    tokenizer = huggingface.load_folder(tmp_path)
    assert tokenizer.special == {'unk': 0, 'eos': 2, 'pad': 6}
    assert tokenizer.vocab_size == 7 + tokenizer.added_bytes
    (tmp_path / 'added_tokens.json').write_text('{"<pad>": 6000000}')
    with pytest.raises(ValueError, match=r"added token '<pad>' has the id 6000000"):
        huggingface.load_folder(tmp_path)


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (b'', 'no pieces'),
        (write(FEW)[:9], 'truncated'),
        (b'\x80', 'truncated'),
        (b'\xff' * 12, 'too many bytes'),
        (b'\x03', 'wire type 3'),
        (write(FEW, kind=3), 'of type WORD; expected BPE or UNIGRAM'),
        (write([*FEW, ('a', -1.0, NORMAL)]), "piece 6: duplicate 'a'"),
        (write([*FEW, ('c', float('nan'), NORMAL)]), "piece 6: 'c' with score nan"),
        (write([*FEW, ('c' * 5000, -1.0, NORMAL)]), 'piece 6: .* a damaged model'),
        (write([*FEW, ('c', -1.0, 9)]), 'of type 9, expected 1 to 6'),
        (write(FEW, trainer=field(24, 1)), 'treat_whitespace_as_suffix'),
        (field(1, field(1, b'\xff')), 'not UTF-8'),
    ],
)
def test_what_is_wrong_is_named(data, message, tmp_path):
    (tmp_path / 'tokenizer.model').write_bytes(data)
    with pytest.raises(ValueError, match=rf'tokenizer\.model: .*{message}'):
        huggingface.load_folder(tmp_path)
