"""Tables of byte strings on disk, in two formats.

    string_table   strings.bin, the strings one after the other; sizes.bin, their sizes as uint32
    equal_info     table.npz, with the arrays `flat`, `offsets` and `written`; how it was compiled
                   in tessera.json

Both keep a SHA-256 in `tessera.json`. It detects damage but not malice, so the arrays themselves
are checked as well.
"""

import hashlib
import io
from typing import NamedTuple

import numpy as np
from etils import epath

from lm.files import array_files, atomic
from tokenization.tokenizer import read_kind, write_kind
from tokenization.vocabularies.longest_match import Strings

_STRINGS_KIND, _COMPILED_KIND = 'string_table', 'equal_info'
_BYTES, _SIZES, _ARRAYS = 'strings.bin', 'sizes.bin', 'table.npz'
_VERSION = 1


class Compiled(NamedTuple):
    """How a table was compiled from a next-byte model.

    Attributes:
      bits_per_token: 16, an id per code; or 8, two ids per code, high byte first.
      rule: which strings it holds: 'canonical', 'delay' or 'tunstall'.
      model_digest: `NextByteModel.digest` of the model.
    """

    bits_per_token: int
    rule: str
    model_digest: str


class Table(NamedTuple):
    """A table as it was read.

    Attributes:
      strings: the bytes of each code.
      written: bool `[codes]`; None if the file does not say: the lowest of equal strings is.
      compiled: how, if it was.
    """

    strings: Strings
    written: np.ndarray | None
    compiled: Compiled | None


def write_strings(path: epath.PathLike, strings: Strings) -> None:
    """Writes strings into the folder `path`, of kind `string_table`."""
    flat, sizes = strings.flat.tobytes(), strings.sizes.astype('<u4').tobytes()
    with atomic.new_folder(path) as folder:
        write_kind(folder, _STRINGS_KIND, sha256=hashlib.sha256(sizes + flat).hexdigest())
        (folder / _BYTES).write_bytes(flat)
        (folder / _SIZES).write_bytes(sizes)


def write_compiled(
    path: epath.PathLike, strings: Strings, written: np.ndarray, compiled: Compiled
) -> None:
    """Writes a compiled table into the folder `path`, of kind `equal_info`."""
    offsets = strings.offsets.astype(np.int32)
    file = io.BytesIO()
    np.savez_compressed(file, flat=strings.flat, offsets=offsets, written=written)
    with atomic.new_folder(path) as folder:
        write_kind(
            folder,
            _COMPILED_KIND,
            version=_VERSION,
            rule=compiled.rule,
            bits_per_token=compiled.bits_per_token,
            model_digest=compiled.model_digest,
            table_sha256=hashlib.sha256(file.getvalue()).hexdigest(),
        )
        (folder / _ARRAYS).write_bytes(file.getvalue())


def read(path: epath.PathLike) -> Table:
    """Returns the table in the folder `path`, of either kind.

    Raises:
      FileNotFoundError, ValueError: a file is missing or damaged, or of another kind; names it.
    """
    fields, folder = read_kind(path, _STRINGS_KIND, _COMPILED_KIND), epath.Path(path)
    if fields['kind'] == _STRINGS_KIND:
        return Table(_read_strings(fields, folder), None, None)
    return _read_compiled(fields, folder)


def _read_strings(fields: dict, folder: epath.Path) -> Strings:
    flat, sizes = (_read_file(folder / name, 'save the tokenizer') for name in (_BYTES, _SIZES))
    if hashlib.sha256(sizes + flat).hexdigest() != fields.get('sha256'):
        raise ValueError(
            f'{folder}: {_BYTES} and {_SIZES} are not the files that were saved here (SHA-256 '
            'differs); save the tokenizer again'
        )
    if len(sizes) % 4:
        raise ValueError(f'{folder / _SIZES}: {len(sizes)} bytes; expected a multiple of 4')
    offsets = np.concatenate([[0], np.cumsum(np.frombuffer(sizes, '<u4'), dtype=np.int64)])
    if offsets[-1] != len(flat):
        raise ValueError(f'{folder / _BYTES}: {len(flat)} bytes; the sizes are {offsets[-1]}')
    return Strings(np.frombuffer(flat, np.uint8), offsets)


def _read_compiled(fields: dict, folder: epath.Path) -> Table:
    file, again = folder / _ARRAYS, 'compile the table'
    if fields.get('version') != _VERSION:
        raise ValueError(
            f'{folder}: an {_COMPILED_KIND} table of version {fields.get("version")}, expected '
            f'{_VERSION}; {again} again'
        )
    for name in (*Compiled._fields, 'table_sha256'):
        if name not in fields:
            raise ValueError(f'{folder}: field {name!r} is missing; {again} again')
    data = _read_file(file, again)
    if hashlib.sha256(data).hexdigest() != fields['table_sha256']:
        raise ValueError(
            f'{file}: not the table that was saved here (SHA-256 differs); {again} again'
        )
    arrays = array_files.read_archive(data, ('flat', 'offsets', 'written'), str(file))
    try:
        strings = Strings(arrays['flat'], arrays['offsets'].astype(np.int64))
    except ValueError as error:
        raise ValueError(f'{file}: {error}; {again} again') from None
    compiled = Compiled(*(fields[name] for name in Compiled._fields))
    return Table(strings, arrays['written'], compiled)


def _read_file(file: epath.Path, how: str) -> bytes:
    if not file.exists():
        raise FileNotFoundError(f'{file}: no such file; {how} again')
    return file.read_bytes()
