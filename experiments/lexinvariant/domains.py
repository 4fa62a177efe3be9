"""Two domains of text, in characters: prose and code.

The standard library holds both: documentation strings and longer comments are prose, the rest is
code. Non-ASCII bytes are dropped, so that a character is a byte below 128.
"""

import inspect
import re
from collections.abc import Sequence

import numpy as np

from experiments import corpora
from experiments.corpora import Corpus
from experiments.lexinvariant.config import DOMAINS, Config
from lm.data.documents import Documents

_STRING = re.compile(rb'[rRbBuUfF]{0,2}("""|\'\'\')(.*?)\1', re.S)
_COMMENT = re.compile(rb'(?:^[ \t]*#.*\n){3,}', re.M)
_MARK = re.compile(rb'^[ \t]*#+ ?', re.M)
_NOT_ASCII = bytes(range(128, 256))
_LEAST_BLOCK, _LEAST_DOCUMENT = 150, 500  # characters
_LEAST_BLANKS = 0.1  # minimal fraction of blanks in prose; tables and ASCII art have fewer


def open_domains(config: Config) -> dict[str, Corpus]:
    """Returns the corpora of both domains, by name.

    Raises:
      ValueError: as `corpora.text_files` does, or if there is too little text of a domain.
    """
    found = {}
    for name, pattern, take in zip(DOMAINS, (config.prose, config.code), (prose, code)):
        source = corpora.standard_library() if pattern is None else corpora.text_files(pattern)
        splits = [_each(getattr(source, split), take if pattern is None else bytes)
                  for split in ('train', 'valid', 'test')]  # fmt: skip
        found[name] = Corpus(f'{source.name}, {name}', *splits)
        least = max(len(document) for document in [*found[name].test, b''])
        if least <= config.train.length or not found[name].train:
            raise ValueError(
                f'{source.name}: the longest held-out document of {name} has {least} characters; '
                f'expected more than {config.train.length}'
            )
    return found


def prose(document: bytes) -> bytes:
    """Returns the long strings and comments of Python source, separated by blank lines."""
    strings = [match.group(2) for match in _STRING.finditer(document)]
    comments = [_MARK.sub(b'', found) for found in _COMMENT.findall(_STRING.sub(b'', document))]
    blocks = [inspect.cleandoc(block.decode('latin-1')) for block in strings + comments]
    return '\n\n'.join(
        block for block in blocks
        if len(block) >= _LEAST_BLOCK and block.count(' ') >= _LEAST_BLANKS * len(block)
    ).encode('latin-1')  # fmt: skip


def code(document: bytes) -> bytes:
    """Returns Python source without long strings and comments."""
    return _COMMENT.sub(b'', _STRING.sub(b'', document))


def _each(documents: Sequence[bytes], take) -> list[bytes]:
    taken = (take(documents[i]).translate(None, _NOT_ASCII) for i in range(len(documents)))
    return [document for document in taken if len(document) >= _LEAST_DOCUMENT]


def chunks(documents: Documents, length: int, count: int) -> np.ndarray:
    """Returns pieces, int32 `[at most count, length]`, spread evenly over the documents.

    Raises:
      ValueError: no document has `length` ids.
    """
    starts = [
        (i, start)
        for i in range(len(documents))
        for start in range(0, len(documents[i]) - length + 1, length)
    ]
    if not starts:
        raise ValueError(
            f'no document has {length} tokens: give longer documents or a smaller --train.length'
        )
    chosen = np.linspace(0, len(starts) - 1, min(count, len(starts))).astype(int)
    pieces = [documents[i][start : start + length] for i, start in (starts[j] for j in chosen)]
    return np.stack(pieces).astype(np.int32)
