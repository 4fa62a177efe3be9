"""The models of converted tokenizers: the pieces that are text, in the engine's format.

Special tokens, ids without bytes and the tokens of single bytes (`<0x41>`) must not match a text
that happens to spell them. They are removed, or renamed to a string with a space, which occurs in
no text that a model sees.
"""

from typing import Any

import numpy as np

from tokenization.huggingface.json_file import TokenizerJson
from tokenization.huggingface.steps import BYTE, SPACE, Kind, stands_alone
from tokenization.vocabularies import spelling

_UNKNOWN = ' unknown'


def model(
    source: TokenizerJson, kind: Kind, special: set[int], bytes_256: np.ndarray
) -> tuple[dict[str, Any], dict[int, int]]:
    """Returns the engine's model.

    Args:
      source: the original.
      kind: how it spells bytes.
      special: ids that are not text.
      bytes_256: the id of each byte.

    Returns:
      The object "model" of a `tokenizer.json`, and engine id -> id of its pieces; all other engine
      ids are the unknown token.
    """
    pieces = {piece: i for piece, i in source.pieces.items() if i not in special}
    if kind == 'words':
        return _word_piece(source, pieces, int(bytes_256[ord(' ')]))
    if source.model == 'Unigram':
        return _unigram(source, pieces)
    if kind == 'letters':
        for byte, i in enumerate(bytes_256.tolist()):
            pieces.setdefault(spelling.to_letters(bytes([byte])), i)
    return _bpe(source, pieces)


def _bpe(source: TokenizerJson, pieces: dict[str, int]) -> tuple[dict[str, Any], dict[int, int]]:
    merges = [(a, b) for a, b in source.merges if {a, b, a + b} <= pieces.keys()]
    described = {
        'type': 'BPE',
        # Without gaps: the engine numbers added tokens from the number of pieces on.
        'vocab': {piece: k for k, piece in enumerate([*pieces, _UNKNOWN])},
        'merges': merges,
        'unk_token': _UNKNOWN,
        'fuse_unk': False,
        'byte_fallback': False,
        'ignore_merges': source.ignore_merges,
        'dropout': None,
        'continuing_subword_prefix': None,
        'end_of_word_suffix': None,
    }
    return described, dict(enumerate(pieces.values()))


def _unigram(
    source: TokenizerJson, pieces: dict[str, int]
) -> tuple[dict[str, Any], dict[int, int]]:
    shown = {piece for piece in pieces if not BYTE.fullmatch(piece)}
    vocabulary: list[tuple[str, float]] = [
        (piece if piece in shown else f' {i}', score)
        for i, (piece, score) in enumerate(zip(source.pieces, source.scores))
    ]
    unknown = source.unknown
    if unknown is None:
        unknown = len(vocabulary)
        vocabulary.append((_UNKNOWN, min(source.scores)))
    described = {'type': 'Unigram', 'unk_id': unknown, 'vocab': vocabulary, 'byte_fallback': False}
    return described, {pieces[piece]: pieces[piece] for piece in shown}


def _word_piece(
    source: TokenizerJson, pieces: dict[str, int], space: int
) -> tuple[dict[str, Any], dict[int, int]]:
    within = {p: i for p, i in pieces.items() if p.startswith(source.continuing)}
    start = {p if stands_alone(p) else SPACE + p: i for p, i in pieces.items() if p not in within}
    # A word that follows no space begins with a continuing piece.
    bare = {piece.removeprefix(source.continuing): i for piece, i in within.items()}
    spelled = [*bare.items(), (SPACE, space), *start.items(), *within.items()]
    vocabulary: dict[str, int] = {}
    id_of: dict[int, int] = {}
    for piece, i in spelled:
        id_of[vocabulary.setdefault(piece, len(vocabulary))] = i
    described = {
        'type': 'WordPiece',
        'vocab': {**vocabulary, _UNKNOWN: len(vocabulary)},
        'unk_token': _UNKNOWN,
        'continuing_subword_prefix': source.continuing,
        'max_input_chars_per_word': source.longest + 1,
    }
    return described, id_of
