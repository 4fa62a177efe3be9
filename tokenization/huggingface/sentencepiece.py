"""Converts SentencePiece's `tokenizer.model` to a `tokenizer.json`.

The file is a Protocol Buffers message, `ModelProto` of sentencepiece_model.proto. Only the wire
format is needed: each field has a number and a type, and its value is a varint, 4 or 8 bytes, or a
length and that many bytes. In proto2 every field may be missing.
"""

import base64
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2
_KINDS = {3: 'WORD', 4: 'CHAR'}
# Far beyond any trained piece (16 by default). Every split of a piece is tried as a merge.
_LONGEST = 1024


class _Piece(NamedTuple):
    text: str
    score: float
    type: int


def read(file: epath.Path, added: Mapping[str, int]) -> tuple[str, dict[str, str]]:
    """Returns `to_json` and `names` of a file; errors name the file."""
    model = file.read_bytes()
    try:
        return to_json(model, added), names(model)
    except ValueError as error:
        raise ValueError(f'{file}: {error}') from None


def names(model: bytes) -> dict[str, str]:
    """Returns role -> spelling of the tokens that begin and end a text; errors as in `to_json`."""
    fields = _fields(model)
    pieces = [_piece(number, data) for number, data in enumerate(_messages(fields, 1))]
    found = _control(pieces, _scalars(_messages(fields, 2)))
    return {role: pieces[i].text for role, i in found.items()}


def to_json(model: bytes, added: Mapping[str, int]) -> str:
    """Returns the text of a `tokenizer.json` with the segmentation of a `tokenizer.model`.

    Args:
      model: the file's bytes.
      added: spelling -> id of special tokens that the model's folder adds.

    Raises:
      ValueError: the bytes are damaged, hold no pieces, or the model is neither BPE nor Unigram.
    """
    fields = _fields(model)
    pieces = [_piece(number, data) for number, data in enumerate(_messages(fields, 1))]
    trainer = _scalars(_messages(fields, 2))
    rules = _scalars(_messages(fields, 3))
    if not pieces:
        raise ValueError('not a SentencePiece model: no pieces')
    kind = trainer.get(3, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE):
        raise ValueError(
            f'a SentencePiece model of type {_KINDS.get(kind, kind)}; expected BPE or UNIGRAM'
        )
    if trainer.get(24):
        raise ValueError('treat_whitespace_as_suffix is set: expected spaces before words')
    seen: dict[str, int] = {}
    for i, piece in enumerate(pieces):
        if seen.setdefault(piece.text, i) != i:
            raise ValueError(f'piece {i}: duplicate {piece.text!r}')
    unknown = next((i for i, piece in enumerate(pieces) if piece.type == _UNKNOWN), None)
    document = {
        'version': '1.0',
        'added_tokens': _added(pieces, kind, added),
        'normalizer': {'type': 'Sequence', 'normalizers': _normalizers(rules)},
        'pre_tokenizer': None,
        'post_processor': _template(pieces, trainer),
        'decoder': _decoder(rules),
        'model': _bpe(pieces, unknown) if kind == _BPE else _unigram(pieces, unknown, trainer),
    }
    return json.dumps(document, ensure_ascii=False)


def _piece(number: int, data: bytes) -> _Piece:
    text, score, kind = '', 0.0, _NORMAL
    for field, value in _fields(data):
        match field, value:
            case 1, bytes():
                try:
                    text = value.decode('utf-8')
                except UnicodeDecodeError:
                    raise ValueError(f'piece {number}: {value[:40]!r} is not UTF-8') from None
            case 2, bytes() if len(value) == 4:
                score = struct.unpack('<f', value)[0]
            case 3, int():
                kind = value
    if not text or len(text) > _LONGEST or abs(score) > 3.4e38 or score != score:
        raise ValueError(f'piece {number}: {text[:40]!r} with score {score}: a damaged model')
    if not _NORMAL <= kind <= _BYTE:
        raise ValueError(f'piece {number}: {text!r} is of type {kind}, expected 1 to 6')
    return _Piece(text, score, kind)


def _added(pieces: list[_Piece], kind: int, added: Mapping[str, int]) -> list[dict[str, Any]]:
    # BPE matches user-defined pieces before its merges; Unigram gives them a high score.
    types = (_UNKNOWN, _CONTROL, _UNUSED, *([_USER] if kind == _BPE else []))
    tokens = {
        piece.text: (i, piece.type != _USER)
        for i, piece in enumerate(pieces)
        if piece.type in types
    }
    for content, i in added.items():
        if i >= len(pieces) + len(added):
            raise ValueError(f'added token {content!r} has the id {i}: the model has {len(pieces)}')
        if i >= len(pieces):
            tokens.setdefault(content, (i, True))
    return [
        {'id': i, 'content': content, 'special': special, 'normalized': not special,
         'single_word': False, 'lstrip': False, 'rstrip': False}
        for content, (i, special) in tokens.items()
    ]  # fmt: skip


def _normalizers(rules: dict[int, Any]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if charsmap := rules.get(2):
        steps.append(
            {'type': 'Precompiled', 'precompiled_charsmap': base64.b64encode(charsmap).decode()}
        )
    if rules.get(4, 1):  # remove_extra_whitespaces
        steps.append({'type': 'Strip', 'strip_left': True, 'strip_right': True})
        steps.append({'type': 'Replace', 'pattern': {'Regex': ' {2,}'}, 'content': ' '})
    if rules.get(3, 1):  # add_dummy_prefix
        steps.append({'type': 'Prepend', 'prepend': '▁'})
    return [*steps, {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}]


def _decoder(rules: dict[int, Any]) -> dict[str, Any]:
    """Returns a decoder for other readers of the file: joins pieces, with `▁` as a space."""
    steps = [
        {'type': 'Replace', 'pattern': {'String': '▁'}, 'content': ' '},
        {'type': 'ByteFallback'},
        {'type': 'Fuse'},
    ]
    if rules.get(3, 1):  # add_dummy_prefix
        steps.append({'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0})
    return {'type': 'Sequence', 'decoders': steps}


def _control(pieces: list[_Piece], trainer: dict[int, Any]) -> dict[str, int]:
    """Returns role -> id of the tokens that begin and end a text, if there are any."""
    ids = {'bos': trainer.get(41, 1), 'eos': trainer.get(42, 2)}
    return {
        role: i for role, i in ids.items() if 0 <= i < len(pieces) and pieces[i].type == _CONTROL
    }


def _template(pieces: list[_Piece], trainer: dict[int, Any]) -> dict[str, Any] | None:
    """Returns a post-processor that adds BOS; no supported model family adds EOS to prompts."""
    if 'bos' not in (ids := _control(pieces, trainer)):
        return None
    i = ids['bos']
    name = pieces[i].text
    before = {'SpecialToken': {'id': name, 'type_id': 0}}
    first, second = ({'Sequence': {'id': x, 'type_id': k}} for k, x in enumerate('AB'))
    return {
        'type': 'TemplateProcessing',
        'single': [before, first],
        'pair': [before, first, second],
        'special_tokens': {name: {'id': name, 'ids': [i], 'tokens': [name]}},
    }


def _unigram(pieces: list[_Piece], unknown: int | None, trainer: dict[int, Any]) -> dict[str, Any]:
    # The library's own score for user-defined pieces: higher than any log-probability.
    scores = [-0.1 if piece.type == _USER else piece.score for piece in pieces]
    return {
        'type': 'Unigram',
        'unk_id': unknown,
        'vocab': [[piece.text, score] for piece, score in zip(pieces, scores)],
        'byte_fallback': bool(trainer.get(35, 0)),
    }


def _bpe(pieces: list[_Piece], unknown: int | None) -> dict[str, Any]:
    """Returns the BPE model: each split of a piece in two is a merge, best-scored pieces first."""
    ids = {piece.text: i for i, piece in enumerate(pieces) if piece.type in (_NORMAL, _USER)}
    merges = []
    for text, i in ids.items():
        cuts = ((text[:k], text[k:]) for k in range(1, len(text)))
        found = [(ids[a], ids[b], a, b) for a, b in cuts if a in ids and b in ids]
        merges += [(-pieces[i].score, *cut) for cut in sorted(found)]
    merges.sort(key=lambda merge: merge[0])  # stable
    return {
        'type': 'BPE', 'dropout': None, 'continuing_subword_prefix': None,
        'end_of_word_suffix': None, 'fuse_unk': True,
        'unk_token': None if unknown is None else pieces[unknown].text,
        'byte_fallback': any(piece.type == _BYTE for piece in pieces), 'ignore_merges': False,
        'vocab': {piece.text: i for i, piece in enumerate(pieces)},
        'merges': [[a, b] for _, _, _, a, b in merges],
    }  # fmt: skip


def _messages(fields: list[tuple[int, int | bytes]], number: int) -> list[bytes]:
    return [value for field, value in fields if field == number and isinstance(value, bytes)]


def _scalars(messages: list[bytes]) -> dict[int, Any]:
    """Returns the last value of each field; varints are signed 64-bit integers."""
    values: dict[int, Any] = {}
    for message in messages:
        for field, value in _fields(message):
            values[field] = value - (1 << 64) if isinstance(value, int) and value >> 63 else value
    return values


def _fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """Returns the fields of a message in order: varints as integers, the others as bytes."""
    return list(_read(data))


def _read(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f'not a SentencePiece model: wire type {kind} at byte {at}')
        if at + size > len(data):
            raise ValueError(f'truncated: {size} bytes expected at byte {at} of {len(data)}')
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError(f'truncated at byte {at}')
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ValueError(f'not a SentencePiece model: a varint of too many bytes at byte {at}')
