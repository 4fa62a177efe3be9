"""The compiled Equal-Info codec: a table of strings, longest match one way, a look-up the other.

Source of the windows: Lester et al., Training LLMs over Neurally Compressed Text (TMLR 2024). How
a table comes from a model is in `codebook`; here no model is left, so that text needs no network,
no accelerator, and no float to become ids.
"""

import dataclasses
import functools
import hashlib
import io
from collections.abc import Sequence
from concurrent import futures

import numpy as np
from etils import epath

from lm.files import array_files, atomic
from tokenization import tokenizer
from tokenization.vocabularies.longest_match import LongestMatch, Strings

_KIND = 'equal_info'
_VERSION = 1
_ARRAYS = 'table.npz'


@dataclasses.dataclass(frozen=True, eq=False)
class EqualInfoTokenizer(tokenizer.OneByOne):
    """A tokenizer over a fixed table of byte strings.

    Attributes:
      strings: the string of each code; several codes may stand for one string.
      written: bool `[codes]`: the codes that `encode` writes, one for each distinct string; among
        them are all 256 single bytes, so that any bytes can be encoded.
      bits_per_token: 16, an id per code; or 8, two ids per code, the high byte first.
      rule: how the table was made: 'canonical', 'delay' or 'tunstall'.
      model_digest: of the next-byte model that it was made from.
    """

    strings: Strings
    written: np.ndarray
    bits_per_token: int
    rule: str
    model_digest: str

    def __post_init__(self) -> None:
        if type(self.bits_per_token) is not int or self.bits_per_token not in (8, 16):
            raise ValueError(f'bits_per_token {self.bits_per_token!r}: expected 8 or 16')
        if self.bits_per_token == 8 and len(self.strings) != 1 << 16:
            raise ValueError(f'{len(self.strings)} codes: tokens of 8 bits need all 65536')
        if self.written.shape != (len(self.strings),) or self.written.dtype != bool:
            raise ValueError(f'written: expected bool [{len(self.strings)}]')
        size = np.diff(self.strings.offsets)
        single = np.flatnonzero(self.written & (size == 1))
        present = self.strings.flat[self.strings.offsets[single]]
        missing = np.setdiff1d(np.arange(256), present)
        if len(missing):
            raise ValueError(f'the single byte {missing[0]} has no code: not all text has codes')

    @property
    def vocab_size(self) -> int:
        """256 for tokens of 8 bits, else the number of codes."""
        return 256 if self.bits_per_token == 8 else len(self.strings)

    @functools.cached_property
    def match(self) -> LongestMatch:
        """The trie of the strings that are written, built at the first use."""
        return LongestMatch.build(self.strings, np.flatnonzero(self.written))

    def encode(self, data: bytes) -> np.ndarray:
        """Returns the ids of `data`, int32 `[T]`: longest matches from left to right."""
        codes = self.match.encode(data)
        if self.bits_per_token == 16:
            return codes
        return codes.astype('>u2').view(np.uint8).astype(np.int32)

    def decode(self, ids: np.ndarray) -> bytes:
        """Returns the bytes of `ids`.

        Raises:
          ValueError: an id is no integer or out of range, or tokens of 8 bits are odd in number.
        """
        ids = tokenizer.check_ids(ids, self.vocab_size)
        if self.bits_per_token == 16:
            return self.strings.join(ids)
        if len(ids) % 2:
            raise ValueError(f'{len(ids)} ids, an odd number: each code is two ids of 8 bits')
        return self.strings.join(ids.astype(np.uint8).view('>u2'))

    def encode_batch(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Returns the ids of each document, encoded on all cores."""
        with futures.ThreadPoolExecutor() as pool:
            return list(pool.map(self.encode, documents))

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of one id.

        Raises:
          ValueError: it is out of range, or half a code, which has no bytes of its own.
        """
        if not 0 <= token < self.vocab_size:
            raise ValueError(f'id {token}: expected 0 to {self.vocab_size - 1}')
        if self.bits_per_token == 8:
            raise ValueError(f'id {token}: 8 bits of a 16-bit code stand for no bytes of their own')
        return self.strings[token]

    def save(self, path: epath.PathLike) -> None:
        """Writes the tokenizer into the folder `path`."""
        file = io.BytesIO()
        np.savez_compressed(
            file,
            flat=self.strings.flat,
            offsets=self.strings.offsets.astype(np.int32),
            written=self.written,
        )
        with atomic.new_folder(path) as folder:
            tokenizer.write_kind(
                folder,
                _KIND,
                version=_VERSION,
                rule=self.rule,
                bits_per_token=self.bits_per_token,
                model_digest=self.model_digest,
                table_sha256=hashlib.sha256(file.getvalue()).hexdigest(),
            )
            (folder / _ARRAYS).write_bytes(file.getvalue())

    @classmethod
    def load(cls, path: epath.PathLike) -> 'EqualInfoTokenizer':
        """Returns the tokenizer saved in the folder `path`.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: a file is damaged, of another kind or of another version.
        """
        head, file = tokenizer.read_kind(path), epath.Path(path) / _ARRAYS
        if head['kind'] != _KIND or head.get('version') != _VERSION:
            raise ValueError(
                f'{path}: a tokenizer of kind {head["kind"]!r}, version {head.get("version")}; '
                f'expected {_KIND!r}, version {_VERSION}'
            )
        fields = ('bits_per_token', 'rule', 'model_digest', 'table_sha256')
        missing = [name for name in fields if name not in head]
        if missing:
            raise ValueError(f'{path}: field {missing[0]!r} is missing; compile the table again')
        if not file.exists():
            raise FileNotFoundError(f'{file}: no such file; compile the table again')
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != head['table_sha256']:
            raise ValueError(
                f'{file}: not the table that was saved here (SHA-256 differs), it is damaged or '
                'from elsewhere; compile the table again'
            )
        arrays = array_files.read_archive(data, ('flat', 'offsets', 'written'), str(file))
        try:
            strings = Strings(arrays['flat'], arrays['offsets'].astype(np.int64))
            return cls(
                strings, arrays['written'], head['bits_per_token'], head['rule'],
                head['model_digest'],
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f'{file}: {error}; compile the table again') from None
