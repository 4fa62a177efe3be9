"""Compares a converted tokenizer with its original, and its ids with the rows of a model."""

from collections.abc import Iterable
from typing import NamedTuple

import tokenizers

from tokenization.huggingface.tokenizer import HuggingFaceTokenizer
from tokenization.tokenizer import Tokenizer

_UNKNOWN = -1


class Difference(NamedTuple):
    """The first position at which two segmentations differ.

    Attributes:
      document: number of the document.
      text: the text from that position on, at most 60 bytes.
      original, converted: the next ids of each, at most 8; -1 is text that the original maps to
        its unknown token.
    """

    document: int
    text: bytes
    original: tuple[int, ...]
    converted: tuple[int, ...]


def same_segmentation(
    original: tokenizers.Tokenizer, converted: HuggingFaceTokenizer, documents: Iterable[bytes]
) -> Difference | None:
    """Returns the first difference between the ids of both tokenizers; None if there is none.

    Two differences are ignored: the space that the original puts before a text (the converted one
    gets it as part of the text), and unknown tokens (the converted one has byte ids instead).
    Texts that the original normalises do differ: see `HuggingFaceTokenizer.repairs`.

    Args:
      original: the tokenizer as `tokenizers` reads it.
      converted: the lossless one.
      documents: UTF-8.
    """
    own = converted.vocab_size - converted.added_bytes
    unknown = converted.special.get('unk')
    for number, document in enumerate(documents):
        data = converted.prefixed(document)
        ids = converted.encode(data).tolist()
        known = [_UNKNOWN if i >= own else i for i in ids]
        wanted = original.encode(document.decode(), add_special_tokens=False).ids
        wanted = _once([_UNKNOWN if i == unknown else i for i in wanted])
        if _once(known) != wanted:
            return _difference(number, data, converted, ids, known, wanted)
    return None


def _once(ids: list[int]) -> list[int]:
    """Returns ids with each run of unknown ones collapsed into one."""
    return [i for k, i in enumerate(ids) if i != _UNKNOWN or k == 0 or ids[k - 1] != _UNKNOWN]


def _difference(
    number: int, data: bytes, converted: HuggingFaceTokenizer, ids: list[int], known: list[int],
    wanted: list[int],
) -> Difference:  # fmt: skip
    found = _once(known)
    same = next((k for k, (a, b) in enumerate(zip(found, wanted)) if a != b), None)
    same = min(len(found), len(wanted)) if same is None else same
    # The position in the text after the first `same` of the collapsed ids.
    at = count = 0
    for k, i in enumerate(ids):
        count += known[k] != _UNKNOWN or k == 0 or known[k - 1] != _UNKNOWN
        if count > same:
            break
        at += len(converted.tokens[i])
    return Difference(
        number, data[at : at + 60], tuple(wanted[same : same + 8]), tuple(found[same : same + 8])
    )


def check_fits(tokenizer: Tokenizer, table_rows: int) -> None:
    """Raises ValueError if a model's table has fewer rows than the tokenizer has ids."""
    if tokenizer.vocab_size > table_rows:
        added = tokenizer.added_bytes if isinstance(tokenizer, HuggingFaceTokenizer) else 0
        why = f', {added} of them added for single bytes' if added else ''
        raise ValueError(
            f'{tokenizer} has {tokenizer.vocab_size} ids{why}; the table has {table_rows} rows; '
            'use the tokenizer that the model was trained with, or give the table more rows'
        )
