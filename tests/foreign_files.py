"""Makes, signs and uses files of every kind that the product reads."""

import base64
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from decoding import calibrate
from experiments import resume, shard_text
from lm.checkpoints import bundle
from lm.data import documents as data
from lm.data import shard_index, shards
from lm.model import params, presets
from lm.training import metrics
from tests.tokenization import toy
from tests.tokenization.huggingface import originals
from tokenization import loading
from tokenization.coding import container, ngram
from tokenization.coding.arithmetic_tokenizer import ArithmeticTokenizer
from tokenization.huggingface.tokenizer import HuggingFaceTokenizer, load_folder
from tokenization.vocabularies import spelling
from tokenization.vocabularies.alphabet import AlphabetTokenizer
from tokenization.vocabularies.bpe import BPETokenizer
from tokenization.vocabularies.byte import ByteTokenizer
from tokenization.vocabularies.longest_match import Strings
from tokenization.vocabularies.patterns import GPT2_PATTERN
from tokenization.vocabularies.table import TableTokenizer
from tokenization.vocabularies.table_files import Compiled

Path = pathlib.Path
FIXTURES = Path(__file__).parent
TEXT = b'the cat sat on the mat; \x00\xff \xe2\x96\x81' * 3
BYTES = [bytes([byte]) for byte in range(256)]
SMALL = presets.tiny(40)


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    try:
        fields = json.loads(file.read_bytes())
        change(fields)
        file.write_text(json.dumps(fields))
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass  # no longer an object


def use_tokenizer(folder: Path) -> None:
    tokenizer = loading.load(folder)
    text = bytes(range(128)) if isinstance(tokenizer, AlphabetTokenizer) else TEXT
    ids = tokenizer.encode(text)
    if not isinstance(tokenizer, ArithmeticTokenizer):  # compiles once per model
        assert tokenizer.decode(ids) == text


def make_bundle(folder: Path) -> None:
    bundle.save(
        folder, SMALL, params.init(SMALL, jax.random.key(0)), ByteTokenizer(), 39, {'a': 1.5}
    )
    edit(folder / 'config.json', lambda fields: fields.pop('digest'))


def make_equal_info(folder: Path) -> None:
    strings = Strings.of([*BYTES, b'th', b'the', b'the '])
    compiled = Compiled(16, 'tunstall', 'x')
    TableTokenizer(strings, np.ones(len(strings), bool), compiled).save(folder)


def sign_table(folder: Path) -> None:
    content = (folder / 'table.npz').read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    edit(folder / 'tessera.json', lambda fields: fields.update(table_sha256=digest))


def sign_strings(folder: Path) -> None:
    content = b''.join((folder / name).read_bytes() for name in ('sizes.bin', 'strings.bin'))
    digest = hashlib.sha256(content).hexdigest()
    edit(folder / 'tessera.json', lambda fields: fields.update(sha256=digest))


def sign_ngram(folder: Path) -> None:
    try:
        with np.load(folder / 'ngram.npz', allow_pickle=False) as arrays:
            kinds = ('children', 'pairs', 'counts')
            levels = [[arrays[f'{kind}_{level}'] for level in range(3)] for kind in kinds]
        if sum(array.nbytes for kind in levels for array in kind) < 1e6:
            digest = ngram.NGram(*map(tuple, levels)).digest
            edit(folder / 'ngram.json', lambda fields: fields.update(digest=digest))
    except Exception:
        pass  # unreadable: nothing to sign


def make_ngram(folder: Path) -> None:
    ngram.count([TEXT, TEXT[7:30]], 2).save(folder)


def make_string_table(folder: Path) -> None:
    TableTokenizer.of([*BYTES, b'th', b'the', b'']).save(folder)


def make_huggingface(name: str) -> Callable[[Path], Any]:
    return lambda folder: shutil.copytree(FIXTURES / 'lm/huggingface' / name, folder)


def make_vocabulary(folder: Path) -> None:
    """Makes GPT-2's two files, and those that name special tokens."""
    folder.mkdir()
    letters = dict(spelling.byte_of_letter())
    (folder / 'vocab.json').write_text(json.dumps(letters | {'he': 256, '<|endoftext|>': 257}))
    (folder / 'merges.txt').write_text('#version: 0.2\nh e\n')
    (folder / 'tokenizer_config.json').write_text('{"bos_token": {"content": "<|endoftext|>"}}')
    (folder / 'special_tokens_map.json').write_text('{"eos_token": "<|endoftext|>"}')


def make_sentencepiece(folder: Path) -> None:
    folder.mkdir()
    letters = [(letter, -1.0 - i, originals.NORMAL) for i, letter in enumerate('▁abcdefghté')]
    pieces = [('<unk>', 0.0, originals.UNKNOWN), *letters, ('▁the', -0.5, originals.NORMAL)]
    (folder / 'tokenizer.model').write_bytes(originals.write(pieces, 1))
    (folder / 'added_tokens.json').write_text('{"<pad>": 13}')


def use_folder(folder: Path) -> None:
    tokenizer = load_folder(folder)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def make_ranks(folder: Path) -> None:
    folder.mkdir()
    lines = [f'{base64.b64encode(t).decode()} {i}\n' for i, t in enumerate([*BYTES, b'th'])]
    (folder / 'x.tiktoken').write_text(''.join(lines))


def use_ranks(folder: Path) -> None:
    tokenizer = BPETokenizer.from_tiktoken_file(folder / 'x.tiktoken', GPT2_PATTERN)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


MODEL = toy.table_model()


def make_container(folder: Path) -> None:
    folder.mkdir()
    text = toy.sample(MODEL, 90)
    (folder / 'x').write_bytes(container.pack(text, MODEL, lanes=2, chunk=20))


def make_encoded(folder: Path) -> None:
    documents = [np.arange(5), np.zeros(0, np.int32), np.arange(30)]
    data.EncodedDocuments.write(folder, documents, 300)


def use_encoded(folder: Path) -> None:
    documents = data.EncodedDocuments(folder)
    total = sum(len(documents[i]) for i in range(min(len(documents), 1000)))
    assert total <= documents.tokens


def make_shards(folder: Path) -> None:
    """Makes one shard of a byte tokenizer in each split."""
    folder.mkdir()
    splits = {}
    for split in shard_text.SPLITS:
        documents = [(np.arange(5), 5), (np.arange(90), 90)]
        file = folder / shard_index.file_name(split, 0, 1)
        splits[split] = (shards.write_shard(file, documents, 256),)
    ByteTokenizer().save(folder / 'tokenizer')
    origin = {'tokenizer': shard_text.digest(ByteTokenizer()), 'text': 'x'}
    shard_index.write_index(folder, shard_index.Index(256, origin, splits))


def use_shards(folder: Path) -> None:
    for split in shard_text.open_splits(folder):
        assert sum(len(split[i]) for i in range(min(len(split), 1000))) <= split.size


def make_run(folder: Path) -> None:
    folder.mkdir()
    resume.claim(folder, SMALL)
    resume.part_once(folder / 'part.json', lambda: [{'a': 1.5}])


def use_run(folder: Path) -> None:
    resume.claim(folder, SMALL)
    resume.part_once(folder / 'part.json', list)


CURVE = calibrate.Curve((1, 4), (0.5, 0.75))


def make_curve(folder: Path) -> None:
    folder.mkdir()
    calibrate.remembered(folder / 'curve.json', {'cpu': 'a'}, lambda: CURVE)


def use_curve(folder: Path) -> None:
    curve = calibrate.remembered(folder / 'curve.json', {'cpu': 'a'}, lambda: CURVE)
    assert curve.at(1) > 0


def make_metrics(folder: Path) -> None:
    folder.mkdir()
    lines = [json.dumps({'step': i, 'loss': 1.5}) for i in range(5)]
    (folder / 'metrics.jsonl').write_text('\n'.join([*lines, '']))


def use_metrics(folder: Path) -> None:
    records = metrics.read_jsonl(folder / 'metrics.jsonl')
    assert all(record['step'] > -(10**40) for record in records)


def make_questions(folder: Path) -> None:
    folder.mkdir()
    line = json.dumps({'category': 'qa', 'turns': ['What is a cat?']})
    (folder / 'question.jsonl').write_text(f'{line}\n{line}\n')


TOKENIZERS = {
    'byte': lambda folder: ByteTokenizer().save(folder),
    'bpe': lambda folder: BPETokenizer((*BYTES, b'th')).save(folder),
    'characters': lambda folder: AlphabetTokenizer().save(folder),
    'equal_info': make_equal_info,
    'string_table': make_string_table,
    'arithmetic': lambda folder: ArithmeticTokenizer(ngram.count([TEXT], 2)).save(folder),
}


def make_saved_huggingface(folder: Path) -> None:
    HuggingFaceTokenizer.from_json(originals.byte_level().to_str()).save(folder)
