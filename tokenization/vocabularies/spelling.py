r"""Bytes as text: the UTF-8 parts of a byte string, and GPT-2's letter for each byte.

>>> list(stretches(b'caf\xc3\xa9 \xff!'))
[('café ', True), ('\udcff', False), ('!', True)]
>>> to_letters(b' the\n'), from_letters('Ġthe')
('ĠtheĊ', b' the')
"""

import functools
import re
from collections.abc import Iterator

# `surrogateescape` maps each byte that is not UTF-8 to one of these.
_NOT_UTF8 = re.compile('[\udc80-\udcff]+')


def stretches(data: bytes) -> Iterator[tuple[str, bool]]:
    """Yields the parts of `data` in order: UTF-8 as text with True, and other bytes with False.

    A byte that is not UTF-8 is the character U+DC00 + byte.
    """
    try:
        whole = data.decode('utf-8')
    except UnicodeDecodeError:
        text, start = data.decode('utf-8', 'surrogateescape'), 0
        for match in _NOT_UTF8.finditer(text):
            if match.start() > start:
                yield text[start : match.start()], True
            yield match.group(), False
            start = match.end()
        if start < len(text):
            yield text[start:], True
    else:
        yield whole, True


@functools.cache
def byte_of_letter() -> dict[str, int]:
    """Returns GPT-2's letter -> byte: printable Latin-1 is itself, the rest U+0100 onwards."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}


@functools.cache
def _letters() -> dict[int, str]:
    return {byte: letter for letter, byte in byte_of_letter().items()}


def to_letters(data: bytes) -> str:
    """Returns the bytes spelled in GPT-2's letters."""
    return data.decode('latin-1').translate(_letters())


def from_letters(text: str) -> bytes | None:
    """Returns the bytes that `text` spells; None if a character is not one of the letters."""
    spelling = byte_of_letter()
    try:
        return bytes([spelling[letter] for letter in text])
    except KeyError:
        return None
