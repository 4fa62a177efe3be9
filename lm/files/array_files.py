"""Arrays in NumPy's files, read as bytes and numbers: no pickles, no more memory than they fill.

NumPy itself allocates what a header promises before it reads on, and unpacks whatever an archive
holds. Here both are compared with the file first.
"""

import io
import math
import zipfile
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from etils import epath

# An archive may unpack to so many times its own bytes and so many more: sorted keys and text pack
# to a tenth at best, and what is small may be anything.
MOST_TIMES, MOST_MORE = 64, 1 << 24


def read_archive(data: bytes, names: Sequence[str], name: str) -> dict[str, np.ndarray]:
    """Returns the arrays with these names of an archive that `np.savez_compressed` wrote.

    Args:
      data: the file's bytes.
      names: of the arrays wanted, without `.npy`.
      name: of the file, for errors.

    Raises:
      ValueError: the archive is damaged, lacks an array, holds objects, or unpacks to far more than
        its own size.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {member: archive.getinfo(f'{member}.npy') for member in names}
            total = sum(info.file_size for info in members.values())
            most = MOST_TIMES * len(data) + MOST_MORE
            if total > most:
                raise ValueError(f'{len(data):,} bytes unpack to {total:,}; expected {most:,}')
            return {member: _member(archive, info) for member, info in members.items()}
    except Exception as error:  # zipfile, zlib and numpy each raise their own on bad bytes
        raise ValueError(f'{name}: damaged: {type(error).__name__}: {error}') from None


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f'{info.filename}: packed by another method than NumPy uses')
    with archive.open(info) as packed:
        content = packed.read(info.file_size + 1)  # without a number it may unpack 2 GB first
    file = io.BytesIO(content)
    shape, by_column, dtype = _header(file)
    values = memoryview(content)[file.tell() :]
    if len(values) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f'{info.filename}: {len(values):,} bytes for {dtype}{list(shape)}')
    return np.frombuffer(values, dtype).reshape(shape, order='F' if by_column else 'C')


def memory_mapped(file: epath.PathLike) -> np.ndarray:
    """Returns the array of a local `.npy` file, mapped into memory, read-only.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, holds objects, or is shorter than its header says.
    """
    try:
        with epath.Path(file).open('rb') as opened:
            shape, _, dtype = _header(opened)
            start = opened.tell()
        size = epath.Path(file).stat().length - start
        if size != math.prod(shape) * dtype.itemsize:
            raise ValueError(f'{size:,} bytes for {dtype}{list(shape)}')
        if not size:
            return np.zeros(shape, dtype)  # nothing cannot be mapped
        return np.load(file, mmap_mode='r', allow_pickle=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy parses a header as Python's own literals, with their errors
        raise ValueError(f'{file}: damaged: {type(error).__name__}: {error}') from None


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Returns shape, whether columns come first, and the dtype: plain numbers."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):  # later ones are for the names of many fields
        raise ValueError(f"version {version} of NumPy's format; expected (1, 0)")
    shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.kind not in 'biuf' or not all(0 <= size < 2**63 for size in shape) or len(shape) > 32:
        raise ValueError(f'{dtype} of shape {str(shape)[:80]}; expected an array of numbers')
    return shape, by_column, dtype
