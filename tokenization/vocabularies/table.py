"""A tokenizer over any table of byte strings: longest match from left to right.

It serves every vocabulary that is a list of strings without merge rules:

- the codes of an Equal-Info codec, or of Tunstall's (`tokenization.equal_info.compiler`): here no
  model is left, so that text becomes ids without a network, an accelerator or a float;
- a subword vocabulary extended to a million words (`tokenization.vocabularies.extension`);
- the tokens for which a hypernetwork predicted rows.

How a table lies on disk is in `tokenization.vocabularies.table_files`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from concurrent import futures

import numpy as np
from etils import epath

from tokenization.tokenizer import EncodesOneByOne, check_ids
from tokenization.vocabularies import table_files
from tokenization.vocabularies.longest_match import LongestMatch, Strings
from tokenization.vocabularies.table_files import Compiled


@dataclasses.dataclass(frozen=True, eq=False)
class TableTokenizer(EncodesOneByOne):
    """A tokenizer over a fixed table of byte strings.

    >>> table = TableTokenizer.of([bytes([byte]) for byte in range(256)] + [b'th', b'the '])
    >>> table.encode(b'the thin')
    array([257, 256, 105, 110], dtype=int32)
    >>> table.decode([257, 256])
    b'the th'

    Attributes:
      strings: the bytes of each code. Several codes may have the same bytes, or none: those of a
        special token are empty.
      written: bool `[codes]`, the codes that `encode` writes: distinct strings, among them all 256
        single bytes, so that any bytes can be encoded.
      compiled: for a table that was compiled from a next-byte model, how.
    """

    strings: Strings
    written: np.ndarray
    compiled: Compiled | None = None

    def __post_init__(self) -> None:
        if self.written.shape != (len(self.strings),) or self.written.dtype != bool:
            raise ValueError(f'written: expected bool [{len(self.strings)}]')
        bits = 16 if self.compiled is None else self.compiled.bits_per_token
        if type(bits) is not int or bits not in (8, 16):
            raise ValueError(f'bits_per_token {bits!r}: expected 8 or 16')
        if bits == 8 and len(self.strings) != 1 << 16:
            raise ValueError(f'{len(self.strings)} codes: tokens of 8 bits need all 65536')
        single = self.strings.offsets[:-1][self.written & (self.strings.sizes == 1)]
        missing = np.setdiff1d(np.arange(256), self.strings.flat[single])
        if len(missing):
            raise ValueError(f'the single byte {missing[0]} has no id: not all text has ids')

    @classmethod
    def of(cls, strings: Strings | list[bytes]) -> 'TableTokenizer':
        """Returns the tokenizer that writes the lowest id of each distinct string.

        Raises:
          ValueError: a single byte has no id.
        """
        table = strings if isinstance(strings, Strings) else Strings.of(strings)
        return cls(table, table.first_of_each())

    @property
    def vocab_size(self) -> int:
        """Number of ids: 256 if each code is two ids of 8 bits, else the number of codes."""
        return 256 if self._halves else len(self.strings)

    def encode(self, data: bytes) -> np.ndarray:
        """Returns the ids of `data`, int32 `[T]`: longest matches from left to right."""
        codes = self._match.encode(data)
        return codes.astype('>u2').view(np.uint8).astype(np.int32) if self._halves else codes

    def encode_batch(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Returns the ids of each document, encoded on all cores."""
        with futures.ThreadPoolExecutor() as pool:
            return list(pool.map(self.encode, documents))

    def decode(self, ids: np.ndarray) -> bytes:
        """Returns the bytes of `ids`.

        Raises:
          ValueError: an id is not an integer or out of range, or the number of 8-bit ids is odd.
        """
        ids = check_ids(ids, self.vocab_size)
        if not self._halves:
            return self.strings.join(ids)
        if len(ids) % 2:
            raise ValueError(f'{len(ids)} ids, an odd number: each code is two ids of 8 bits')
        return self.strings.join(ids.astype(np.uint8).view('>u2'))

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of one id; of a special token, none.

        Raises:
          ValueError: the id is out of range, or half a code, which has no bytes of its own.
        """
        [i] = check_ids(np.array([token]), self.vocab_size)
        if self._halves:
            raise ValueError(f'id {token} is half of a 16-bit code: it has no bytes of its own')
        return self.strings[i]

    def in_bytes(self) -> 'TableTokenizer':
        """Returns a compiled table whose codes are written as two ids of 8 bits, high byte first.

        Raises:
          ValueError: the table was not compiled, or does not have 65,536 codes.
        """
        if self.compiled is None:
            raise ValueError('only the codes of a compiled table can be split into 8-bit ids')
        return dataclasses.replace(self, compiled=self.compiled._replace(bits_per_token=8))

    def save(self, path: epath.PathLike) -> None:
        """Writes the tokenizer into the folder `path`.

        Raises:
          ValueError: `written` would not be read back: without `compiled` it is not saved.
        """
        if self.compiled is None:
            if not np.array_equal(self.written, self.strings.first_of_each()):
                raise ValueError('written: expected the lowest id of each string, as `of` has it')
            table_files.write_strings(path, self.strings)
        else:
            table_files.write_compiled(path, self.strings, self.written, self.compiled)

    @classmethod
    def load(cls, path: epath.PathLike) -> 'TableTokenizer':
        """Returns the tokenizer saved in the folder `path`.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: a file is damaged, of another kind or of another version.
        """
        strings, written, compiled = table_files.read(path)
        try:
            return cls(strings, strings.first_of_each() if written is None else written, compiled)
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from None

    @functools.cached_property
    def _match(self) -> LongestMatch:
        """The trie of the written strings, built at the first use."""
        return LongestMatch.build(self.strings, np.flatnonzero(self.written))

    @property
    def _halves(self) -> bool:
        return self.compiled is not None and self.compiled.bits_per_token == 8
