"""Reads a `tokenizer.json` of Hugging Face `tokenizers` as untrusted input.

Only the fields that encoding needs are kept, and each is checked: on some malformed files the
library itself would end the thread. Ids are bounded by the size of the file.
"""

import json
import math
from typing import Any, NamedTuple


class Added(NamedTuple):
    """A token that is matched in the text before the model runs."""

    content: str
    id: int
    special: bool
    normalized: bool
    single_word: bool
    strips: bool  # absorbs the blanks beside it


class TokenizerJson(NamedTuple):
    """The checked contents of a `tokenizer.json`.

    Attributes:
      model: 'BPE', 'Unigram' or 'WordPiece'.
      pieces: spelling -> id of the model's vocabulary.
      scores: log-probability of each piece of a Unigram model, in the order of `pieces`.
      merges: the pairs of a BPE model, in order.
      unknown: id of the model's unknown token.
      ignore_merges: whether a pretoken that is a piece becomes that piece without merges.
      continuing: prefix of WordPiece's pieces that continue a word, `##`.
      longest: greatest number of characters of a word in a WordPiece model.
      added: all added tokens.
      normalizers, pre_tokenizers: steps, with sequences flattened.
      template: names of the special tokens that the post-processor puts before and after a text.
    """

    model: str
    pieces: dict[str, int]
    scores: tuple[float, ...]
    merges: tuple[tuple[str, str], ...]
    unknown: int | None
    ignore_merges: bool
    continuing: str
    longest: int
    added: tuple[Added, ...]
    normalizers: tuple[dict, ...]
    pre_tokenizers: tuple[dict, ...]
    template: tuple[tuple[str, ...], tuple[str, ...]]


def parse(text: str) -> TokenizerJson:
    """Returns the tokenizer of a `tokenizer.json`.

    Raises:
      ValueError: a field is missing or of the wrong type, a token or id is a duplicate, an id is
        out of range, a merge does not make a token, or the model is of an unsupported type.
    """
    try:
        document = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'not a tokenizer.json: {error}') from None
    if not isinstance(document, dict) or not isinstance(document.get('model'), dict):
        raise ValueError('not a tokenizer.json: no object "model"')
    model = document['model']
    added = tuple(_added(item) for item in _list(document, 'added_tokens'))
    kind = _kind(model)
    pieces, scores = _unigram_pieces(model) if kind == 'Unigram' else (_pieces(model), ())
    _check_ids(pieces, added, len(text))
    return TokenizerJson(
        model=kind,
        pieces=pieces,
        scores=scores,
        merges=_merges(model, pieces) if kind == 'BPE' else (),
        unknown=_unknown(model, pieces),
        ignore_merges=model.get('ignore_merges') is True,
        continuing=_string(model, 'continuing_subword_prefix') if kind == 'WordPiece' else '',
        longest=_count(model, 'max_input_chars_per_word', 100),
        added=added,
        normalizers=tuple(_steps(document.get('normalizer'), 'normalizers')),
        pre_tokenizers=tuple(_steps(document.get('pre_tokenizer'), 'pretokenizers')),
        template=_template(document.get('post_processor')),
    )


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f'duplicate key {twice!r}')
    return unique


def _kind(model: dict) -> str:
    kind = model.get('type')
    if kind is None:  # in older files
        kind = next(
            (k for k, f in (('BPE', 'merges'), ('Unigram', 'unk_id')) if f in model), 'WordPiece'
        )
    if kind == 'WordLevel':
        raise ValueError(
            'model.type "WordLevel": words outside the vocabulary have no ids; '
            'use a BPE, Unigram or WordPiece tokenizer'
        )
    if kind not in ('BPE', 'Unigram', 'WordPiece'):
        raise ValueError(f'model.type {kind!r}: expected "BPE", "Unigram" or "WordPiece"')
    if kind == 'BPE':
        for field in ('continuing_subword_prefix', 'end_of_word_suffix'):
            if model.get(field):
                raise ValueError(
                    f'model.{field} {model[field]!r}: only BPE over bytes or with "▁" is supported'
                )
    return kind


def _pieces(model: dict) -> dict[str, int]:
    vocab = model.get('vocab')
    if not isinstance(vocab, dict) or not vocab:
        raise ValueError('model.vocab: expected an object of tokens and ids, with at least one')
    for piece, i in vocab.items():
        if not _is_id(i) or not piece:
            raise ValueError(
                f'model.vocab: token {piece!r} has the id {i!r}; expected 0, 1, 2, ...'
            )
        _check_text(piece)
    return vocab


def _unigram_pieces(model: dict) -> tuple[dict[str, int], tuple[float, ...]]:
    vocab = model.get('vocab')
    if not isinstance(vocab, list) or not vocab:
        raise ValueError('model.vocab: expected a list of tokens and scores, with at least one')
    pieces: dict[str, int] = {}
    scores = []
    for i, item in enumerate(vocab):
        match item:
            case [str(piece), int() | float() as score] if piece and abs(score) < math.inf:
                _check_text(piece)
            case _:
                raise ValueError(f'model.vocab[{i}]: {item!r}; expected a token and its score')
        if piece in pieces:
            raise ValueError(f'model.vocab[{i}]: duplicate token {piece!r}')
        pieces[piece] = i
        scores.append(float(score))
    return pieces, tuple(scores)


def _check_text(piece: str) -> None:
    try:
        piece.encode()
    except UnicodeEncodeError:
        raise ValueError(f'model.vocab: token {piece!r} is not UTF-8') from None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_ids(pieces: dict[str, int], added: tuple[Added, ...], size: int) -> None:
    """Raises ValueError unless ids and tokens are one to one, and ids bounded by the file."""
    names: dict[int, str] = {}
    for piece, i in [*pieces.items(), *((token.content, token.id) for token in added)]:
        if names.setdefault(i, piece) != piece:
            raise ValueError(f'duplicate id {i}, of {names[i]!r} and {piece!r}')
        if i >= size:
            raise ValueError(
                f'token {piece!r} has the id {i}, too large for a file of {size} bytes'
            )
    for token in added:
        if pieces.get(token.content, token.id) != token.id:
            raise ValueError(
                f'added token {token.content!r} has the id {token.id}, but '
                f'{pieces[token.content]} in model.vocab'
            )
    if len({token.content for token in added}) < len(added):
        raise ValueError('added_tokens: a duplicate token')


def _merges(model: dict, pieces: dict[str, int]) -> tuple[tuple[str, str], ...]:
    merges = []
    for number, merge in enumerate(_list(model, 'merges')):
        match merge.split(' ') if isinstance(merge, str) else merge:
            case [str(left), str(right)] if left and right:
                pass
            case _:
                raise ValueError(f'model.merges[{number}]: {merge!r}; expected two tokens')
        if not (left in pieces and right in pieces and left + right in pieces):
            missing = next(p for p in (left, right, left + right) if p not in pieces)
            raise ValueError(
                f'model.merges[{number}]: {left!r} and {right!r}: {missing!r} is not in model.vocab'
            )
        merges.append((left, right))
    return tuple(merges)


def _unknown(model: dict, pieces: dict[str, int]) -> int | None:
    i, name = model.get('unk_id'), model.get('unk_token')
    if i is not None:
        if not _is_id(i) or i >= len(pieces):
            raise ValueError(f'model.unk_id {i!r}: expected an id of model.vocab')
        return i
    return pieces.get(name) if isinstance(name, str) else None


def _added(item: Any) -> Added:
    match item:
        case {'id': i, 'content': str(content)} if _is_id(i) and content:
            _check_text(content)
        case _:
            raise ValueError(f'added_tokens: {str(item)[:80]}; expected an "id" and a "content"')
    special, normalized, single_word, left, right = (
        item.get(flag) is True
        for flag in ('special', 'normalized', 'single_word', 'lstrip', 'rstrip')
    )
    return Added(content, i, special, normalized, single_word, strips=left or right)


def _steps(step: Any, field: str, depth: int = 0) -> list[dict]:
    """Flattens a normalizer, pre-tokenizer or post-processor."""
    if step is None:
        return []
    if not isinstance(step, dict) or not isinstance(step.get('type'), str) or depth > 8:
        raise ValueError(f'{field}: {str(step)[:80]}; expected an object with a "type"')
    if step['type'] != 'Sequence':
        return [step]
    return [inner for s in _list(step, field) for inner in _steps(s, field, depth + 1)]


def _template(step: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the special tokens that the post-processor puts before a text, and after it."""
    before: list[str] = []
    after: list[str] = []
    for inner in _steps(step, 'processors'):
        kind = inner['type']
        if kind in ('BertProcessing', 'RobertaProcessing'):
            for names, key in ((before, 'cls'), (after, 'sep')):
                match inner.get(key):
                    case [str(name), *_]:
                        names.append(name)
        elif kind == 'TemplateProcessing':
            side = before
            for item in _list(inner, 'single'):
                match item:
                    case {'Sequence': _}:
                        side = after
                    case {'SpecialToken': {'id': str(name)}}:
                        side.append(name)
    return tuple(before), tuple(after)


def _list(owner: dict, field: str) -> list:
    value = owner.get(field)
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f'{field}: {str(value)[:80]}; expected a list')
    return value


def _string(owner: dict, field: str) -> str:
    value = owner.get(field)
    if not isinstance(value, str) or not value:
        raise ValueError(f'{field}: {value!r}; expected a string')
    return value


def _count(owner: dict, field: str, default: int) -> int:
    value = owner.get(field, default)
    if not _is_id(value) or value >= 1 << 20:
        raise ValueError(f'{field}: {value!r}; expected a count')
    return value
