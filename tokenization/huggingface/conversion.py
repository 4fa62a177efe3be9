"""Makes a Hugging Face tokenizer lossless: every id gets bytes, and every byte an id.

Vocabulary, merges and scores stay the same. The steps around them change, and each change is
reported as a repair: steps that lose information (lower case, Unicode normal forms, removal of
blanks) are left out, no space is put before a text, and bytes without a token get ids after the
last one. Vocabularies spell bytes in one of three ways:

- letters: BPE over GPT-2's 256 letters for bytes;
- metaspace: characters, with `▁` for the space; BPE or Unigram, often with tokens `<0x41>` for
  single bytes;
- words: WordPiece. `##x` is the bytes `x`. A token `x` that begins a word is ` x`, with its space,
  unless it is a single punctuation mark or ideograph, which is a word of its own in BERT.
"""

import json
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import models

from tokenization.huggingface import models as conversion_models
from tokenization.huggingface import steps
from tokenization.huggingface.json_file import Added, TokenizerJson
from tokenization.huggingface.steps import BYTE, SPACE, Kind
from tokenization.vocabularies import spelling


class Converted(NamedTuple):
    """A lossless tokenizer.

    Attributes:
      kind: how the vocabulary spells bytes.
      engine: maps text to ids of its own.
      model: the engine's model, without the steps before it.
      whole: bytes and ids of the added tokens, which the engine matches before it runs the model.
      ids: engine id -> id; -1 for the unknown token.
      tokens: the bytes of each id; empty for special tokens and ids without a token.
      bytes: the id of each byte, int32[256].
      added: number of ids at the end that were added for single bytes.
      known: the characters of the vocabulary; the engine sees no others, except for kind letters.
      prefix: the original puts a space before a text: '' never, 'always', or 'unless' it has one.
      repairs: the differences from the original, a sentence each.
    """

    kind: Kind
    engine: tokenizers.Tokenizer
    model: models.Model
    whole: dict[bytes, int]
    ids: np.ndarray
    tokens: tuple[bytes, ...]
    bytes: np.ndarray
    added: int = 0
    known: frozenset[str] = frozenset()
    prefix: str = ''
    repairs: tuple[str, ...] = ()


def convert(source: TokenizerJson) -> Converted:
    """Returns the lossless tokenizer.

    Raises:
      ValueError: spaces are lost or spelled in an unknown way, or a step is unknown.
    """
    repairs: list[str] = []
    kind = steps.kind_of(source)
    tokens, special = _tokens(source, kind, repairs)
    bytes_256, added = _byte_ids(source, kind, tokens, repairs)
    normalizers, pre_tokenizers, prefix = steps.lossless(source, kind, repairs)
    extra = _added_tokens(source, kind, special, repairs)
    model, id_of = conversion_models.model(source, kind, special, bytes_256)
    document = {
        'version': '1.0',
        'added_tokens': [
            {'id': a.id, 'content': a.content, 'special': False, 'normalized': a.normalized,
             'single_word': a.single_word, 'lstrip': False, 'rstrip': False}
            for a in extra
        ],
        'normalizer': {'type': 'Sequence', 'normalizers': normalizers},
        'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': pre_tokenizers},
        'model': model,
    }  # fmt: skip
    engine = _engine(document)
    # The engine numbers added tokens by itself.
    engine_ids = engine.get_vocab(with_added_tokens=True)
    id_of |= {engine_ids[a.content]: a.id for a in extra}
    ids = np.full(engine.get_vocab_size() + 1, -1, np.int32)
    ids[np.array(list(id_of), np.int64)] = list(id_of.values())
    texts = [piece for piece, i in source.pieces.items() if i not in special]
    known = frozenset(''.join([*texts, *(a.content for a in extra)])) | {' '}
    whole = {tokens[a.id]: a.id for a in extra}
    return Converted(
        kind, engine, engine.model, whole, ids, tuple(tokens), bytes_256, added, known - {SPACE},
        prefix, tuple(repairs),
    )  # fmt: skip


def _tokens(source: TokenizerJson, kind: Kind, repairs: list[str]) -> tuple[list[bytes], set[int]]:
    """Returns the bytes of each id, and the ids that have none."""
    special = {a.id for a in source.added if a.special}
    if source.unknown is not None:
        special.add(source.unknown)
    used = {**source.pieces, **{a.content: a.id for a in source.added}}
    tokens = [b''] * (max(used.values()) + 1)
    plain = {a.content for a in source.added}
    unclear = []
    for piece, i in used.items():
        if i in special:
            continue
        if kind == 'letters':
            spelled = piece.encode() if piece in plain else spelling.from_letters(piece)
        else:
            spelled = _word(piece, source.continuing) if kind == 'words' else _piece(piece)
        if not spelled:
            unclear.append(piece)
            special.add(i)
        tokens[i] = spelled or b''
    if unclear:
        repairs.append(f'{len(unclear)} tokens spell no bytes, {unclear[0]!r} first: never used')
    holes = sorted(set(range(len(tokens))) - set(used.values()))
    if holes:
        repairs.append(f'{len(holes)} ids have no token, {holes[0]} first: never used')
    if not any(tokens):
        raise ValueError('the vocabulary holds no token but special ones')
    return tokens, special | set(holes)


def _piece(piece: str) -> bytes:
    match = BYTE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece.replace(SPACE, ' ').encode()


def _word(piece: str, continuing: str) -> bytes:
    if piece.startswith(continuing):
        return piece[len(continuing) :].encode()
    return piece.encode() if steps.stands_alone(piece) else b' ' + piece.encode()


def _byte_ids(
    source: TokenizerJson, kind: Kind, tokens: list[bytes], repairs: list[str]
) -> tuple[np.ndarray, int]:
    """Returns the id of each byte and the number of added ids; appends those to `tokens`."""
    single: dict[bytes, int] = {}
    for i, token in enumerate(tokens):
        if len(token) == 1:
            single.setdefault(token, i)
    if kind == 'metaspace':
        fallback = ((BYTE.fullmatch(piece), i) for piece, i in source.pieces.items())
        single.update({bytes([int(m[1], 16)]): i for m, i in fallback if m and tokens[i]})
    missing = [bytes([b]) for b in range(256) if bytes([b]) not in single]
    if missing:
        repairs.append(
            f'{len(missing)} of the 256 single bytes have no token, byte {missing[0][0]} first: '
            f'added as ids {len(tokens)} to {len(tokens) + len(missing) - 1}'
        )
        single.update({byte: len(tokens) + k for k, byte in enumerate(missing)})
        tokens += missing
    return np.array([single[bytes([b])] for b in range(256)], np.int32), len(missing)


def _added_tokens(
    source: TokenizerJson, kind: Kind, special: set[int], repairs: list[str]
) -> list[Added]:
    """Returns the added tokens that are text."""
    kept = [a for a in source.added if a.id not in special]
    if any(a.strips for a in kept):
        repairs.append('added tokens do not absorb the blanks beside them')
    if kind == 'letters':
        return kept
    # A literal `▁` never reaches the engine, and a literal `<0x41>` is not the byte.
    return [
        a
        for a in kept
        if not BYTE.fullmatch(a.content) and (a.normalized or SPACE not in a.content)
    ]


def _engine(document: dict) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f'cannot read this tokenizer.json: {error}') from None
