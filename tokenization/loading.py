"""Loads saved tokenizers. A new kind is one file, and one line in `KINDS`."""

from collections.abc import Mapping
from typing import Protocol

from etils import epath

from tokenization.coding.arithmetic_tokenizer import ArithmeticTokenizer
from tokenization.huggingface.tokenizer import HuggingFaceTokenizer
from tokenization.tokenizer import Tokenizer, read_kind
from tokenization.vocabularies.alphabet import AlphabetTokenizer
from tokenization.vocabularies.bpe import BPETokenizer
from tokenization.vocabularies.byte import ByteTokenizer
from tokenization.vocabularies.table import TableTokenizer


class Loadable(Protocol):
    """A class of tokenizers that can be loaded."""

    @classmethod
    def load(cls, path: epath.PathLike) -> Tokenizer:
        """Returns the tokenizer saved in the folder `path`.

        Raises:
          FileNotFoundError, ValueError: a file is missing or damaged, or of another kind.
        """
        ...


# From the field "kind" of tessera.json, see `tokenizer.write_kind`, to the class that saves it.
KINDS: dict[str, type[Loadable]] = {
    'byte': ByteTokenizer,
    'bpe': BPETokenizer,
    'characters': AlphabetTokenizer,
    'string_table': TableTokenizer,
    'equal_info': TableTokenizer,
    'arithmetic': ArithmeticTokenizer,
    'huggingface': HuggingFaceTokenizer,
}


def load(path: epath.PathLike, *, kinds: Mapping[str, type[Loadable]] = KINDS) -> Tokenizer:
    """Returns the tokenizer saved in the folder `path`; never executes code from there.

    Args:
      path: a folder that a tokenizer's `save` has written.
      kinds: those that may be in it, by name: `{**KINDS, 'mine': Mine}` reads one of your own too.

    Raises:
      FileNotFoundError: `path` holds no tokenizer, or a file is missing.
      ValueError: a file is damaged, or the kind is unknown.
    """
    kind = read_kind(path)['kind']
    if kind not in kinds:
        raise ValueError(
            f'{path}: unknown tokenizer kind {kind!r}; this version knows {", ".join(kinds)}'
        )
    return kinds[kind].load(path)
