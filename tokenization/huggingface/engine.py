"""Encodes with a converted tokenizer; text that its engine cannot read becomes byte ids."""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from tokenization.huggingface.conversion import SPACE, Converted
from tokenization.vocabularies import spelling


def encode(converted: Converted, documents: Sequence[bytes]) -> list[np.ndarray]:
    """Returns the ids of each document, int32, encoded on all cores."""
    plans = [list(_cut(converted, document)) for document in documents]
    texts = [part for plan in plans for part in plan if isinstance(part, str)]
    encodings = converted.engine.encode_batch_fast(texts, add_special_tokens=False)
    encoded = iter(zip(texts, encodings))
    results = []
    for plan in plans:
        parts = [np.zeros(0, np.int32)]
        for part in plan:
            if isinstance(part, bytes):
                parts.append(_bytes(converted, part))
                continue
            text, encoding = next(encoded)
            ids = converted.ids[np.array(encoding.ids, np.int64)]
            parts.append(ids if np.all(ids >= 0) else _with_unknown(converted, text))
        results.append(np.concatenate(parts))
    return results


def encode_piece(converted: Converted, data: bytes) -> list[int]:
    """Returns the ids of a string taken as one pretoken: the model sees it unsplit."""
    if data in converted.whole:
        return [converted.whole[data]]
    if converted.kind == 'words':  # no piece crosses two words
        return encode(converted, [data])[0].tolist()
    table, model = converted.ids, converted.model
    if converted.kind == 'letters':
        found = model.tokenize(spelling.to_letters(data))
        return [int(table[token.id]) for token in found]
    ids: list[int] = []
    for part in _cut(converted, data):
        if isinstance(part, bytes):
            ids += _bytes(converted, part).tolist()
            continue
        text = part.replace(' ', SPACE)
        for token in model.tokenize(text):
            known = int(table[token.id])
            if known >= 0:
                ids.append(known)
            else:
                start, end = token.offsets  # in bytes; those of `encode` are in characters
                unknown = text.encode()[start:end].replace(SPACE.encode(), b' ')
                ids += _bytes(converted, unknown).tolist()
    return ids


def _cut(converted: Converted, data: bytes) -> Iterator[str | bytes]:
    """Yields the parts of `data` in order: those that the engine can read as text, others as bytes.

    No piece contains a foreign character, so text may be cut there.
    """
    for text, valid in spelling.stretches(data):
        if not valid:
            yield bytes(ord(letter) - 0xDC00 for letter in text)
            continue
        foreign = set() if converted.kind == 'letters' else set(text) - converted.known
        if not foreign:
            yield text
            continue
        cut = re.compile('([' + ''.join(map(re.escape, sorted(foreign))) + ']+)')
        for i, part in enumerate(cut.split(text)):
            if part:
                yield part.encode() if i % 2 else part


def _bytes(converted: Converted, data: bytes) -> np.ndarray:
    return converted.bytes[np.frombuffer(data, np.uint8)]


def _with_unknown(converted: Converted, text: str) -> np.ndarray:
    """Returns the ids of a text, with byte ids instead of the unknown token."""
    encoding = converted.engine.encode(text, add_special_tokens=False)
    parts: list[np.ndarray] = []
    for i, (start, end) in zip(converted.ids[encoding.ids].tolist(), encoding.offsets):
        known = np.array([i], np.int32)
        parts.append(known if i >= 0 else _bytes(converted, text[start:end].encode()))
    return np.concatenate(parts)
