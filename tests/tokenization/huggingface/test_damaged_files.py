"""Damaged and hostile tokenizer files: a ValueError, or a lossless tokenizer."""

import copy
import json
import pathlib
import random

import pytest

from tests.tokenization.huggingface.originals import MAKERS, NORMAL, UNKNOWN, USER, write
from tokenization.huggingface import sentencepiece
from tokenization.huggingface.tokenizer import HuggingFaceTokenizer
from tokenization.vocabularies.bpe import BPETokenizer
from tokenization.vocabularies.patterns import GPT2_PATTERN

JUNK: list = [None, True, -1, 0, 3, 1e300, 2**63, '', 'a', '▁', '\ud800', [], {}, [[]], '(']
JUNK += ['ByteLevel', 'Metaspace', 'Split', 'Sequence', 'Replace', '<0x41>', ' unknown']
JUNK += ['BPE', 'Unigram', 'WordPiece']
BPE = pathlib.Path(__file__).parent / 'sentencepiece' / 'bpe.model'
DATA = 'Some text ▁ <0x41>\n\t naïve 漢 '.encode() + bytes(range(256))


def small(document: dict) -> dict:
    """Returns the tokenizer with few tokens, so that random mutations often hit other fields."""
    model = document['model']
    if isinstance(model['vocab'], list):
        model['vocab'] = model['vocab'][:60]
    else:
        kept = sorted(model['vocab'], key=model['vocab'].get)[:300]
        model['vocab'] = {piece: model['vocab'][piece] for piece in kept}
        if 'merges' in model:
            model['merges'] = [
                m for m in model['merges'] if {*m, ''.join(m)} <= model['vocab'].keys()
            ]
    document['added_tokens'] = document['added_tokens'][:3]
    return document


def places(node, path=()):
    """Yields the path of every value in a document."""
    yield path
    if isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from places(child, (*path, key))


def mutate(document: dict, rng: random.Random) -> str:
    document = copy.deepcopy(document)
    for _ in range(rng.randrange(1, 4)):
        short = [p for p in places(document) if p and (len(p) < 3 or rng.random() < 0.05)]
        *path, last = rng.choice(short)
        owner = document
        for key in path:
            owner = owner[key]
        match rng.randrange(4):
            case 0:
                del owner[last]
            case 1 if isinstance(owner, dict):
                owner[rng.choice(['type', 'a', '\ud800', 'unk_id', 'pattern'])] = rng.choice(JUNK)
            case 2 if isinstance(owner, list):
                owner.insert(rng.randrange(len(owner) + 1), copy.deepcopy(rng.choice(owner)))
            case _:
                owner[last] = rng.choice(JUNK)
    return json.dumps(document)


def corrupt(data: bytes, rng: random.Random) -> bytes:
    """Returns data with bytes changed, removed or repeated, or truncated."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + rng.randrange(1, 5)]
            case 2:
                data[at:at] = data[at : at + rng.randrange(1, 40)]
            case 3:
                del data[max(1, len(data) - at // 20) :]
    return bytes(data)


def accepted(make) -> bool:
    """Returns whether a tokenizer is made, and asserts that it is lossless."""
    try:
        tokenizer = make()
        ids = tokenizer.encode(DATA)
    except ValueError as error:
        assert str(error)
        return False
    assert tokenizer.decode(ids) == DATA
    assert tokenizer.vocab_size < 5000
    tokenizer.encode_piece(DATA)
    return True


@pytest.mark.parametrize('name', MAKERS)
def test_changed_json(name):
    rng = random.Random(name)
    document = small(json.loads(MAKERS[name]().to_str()))
    texts = [mutate(document, rng) for _ in range(150)]
    plain = json.dumps(document).encode()
    texts += [corrupt(plain, rng).decode('latin-1') for _ in range(60)]
    made = [accepted(lambda text=text: HuggingFaceTokenizer.from_json(text)) for text in texts]
    assert 20 < sum(made) < len(made) - 20


@pytest.mark.parametrize('kind', [1, 2])
def test_changed_sentencepiece(kind):
    rng = random.Random(kind)
    letters = [(letter, -1.0 - i, NORMAL) for i, letter in enumerate('▁abcdefghté')]
    pieces = [('<unk>', 0.0, UNKNOWN), *letters, ('▁the', -0.5, NORMAL), ('<t>', 0.0, USER)]
    first, second = write(pieces, kind), BPE.read_bytes()
    files = [corrupt(first, rng) for _ in range(250)] + [corrupt(second, rng) for _ in range(10)]
    made = [
        accepted(lambda data=data: HuggingFaceTokenizer.from_json(sentencepiece.to_json(data, {})))
        for data in files
    ]
    assert 10 < sum(made) < len(made) - 20


def test_changed_ranks(tmp_path):
    rng = random.Random(0)
    tokens = (*(bytes([byte]) for byte in range(256)), b'th', b'the')
    BPETokenizer(tokens).save(tmp_path / 'x')
    data = (tmp_path / 'x' / 'ranks.tiktoken').read_bytes()
    made = 0
    for number in range(150):
        file = tmp_path / f'{number}.tiktoken'
        file.write_bytes(corrupt(data, rng))
        made += accepted(lambda file=file: BPETokenizer.from_tiktoken_file(file, GPT2_PATTERN))
    assert made < 100


def test_deep_json():
    for text in ('[' * 100_000, '{"model":' * 100_000, '{"a":' * 50_000 + '1' + '}' * 50_000):
        with pytest.raises(ValueError, match=r'not a tokenizer.json'):
            HuggingFaceTokenizer.from_json(text)
    step: dict = {'type': 'NFC'}
    for _ in range(20):
        step = {'type': 'Sequence', 'normalizers': [step]}
    with pytest.raises(ValueError, match='normalizers'):
        HuggingFaceTokenizer.from_json(
            json.dumps({'model': {'type': 'BPE', 'vocab': {'a': 0}}, 'normalizer': step})
        )
