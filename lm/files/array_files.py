"""Reads NumPy's files safely: no pickles, and memory bounded by the size of the file.

NumPy allocates what a header claims before it reads the data, and decompresses whatever an archive
holds. Here both are checked against the file first.
"""

import io
import math
import zipfile
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from etils import epath

# An archive may decompress to MOST_TIMES its size plus MOST_MORE bytes: sorted keys and text
# compress to a tenth at best; the constant is for small archives, which may reach any ratio.
MOST_TIMES, MOST_MORE = 64, 1 << 24


def read_archive(data: bytes, names: Sequence[str], name: str) -> dict[str, np.ndarray]:
    """Returns the named arrays of an archive written by `np.savez_compressed`.

    Args:
      data: the file's bytes.
      names: names of the arrays to read, without `.npy`.
      name: name of the file, for errors.

    Raises:
      ValueError: the archive is damaged, lacks an array, contains Python objects, or decompresses
        to far more than its own size.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {member: archive.getinfo(f'{member}.npy') for member in names}
            total = sum(info.file_size for info in members.values())
            most = MOST_TIMES * len(data) + MOST_MORE
            if total > most:
                raise ValueError(
                    f'{len(data):,} bytes decompress to {total:,}; expected {most:,} at most'
                )
            return {member: _member(archive, info) for member, info in members.items()}
    except Exception as error:  # on bad bytes, zipfile, zlib and NumPy raise their own
        raise ValueError(f'{name}: damaged: {type(error).__name__}: {error}') from None


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f'{info.filename}: compressed by a method that NumPy does not use')
    with archive.open(info) as compressed:
        # without a size, it may decompress 2 GB first
        content = compressed.read(info.file_size + 1)
    file = io.BytesIO(content)
    shape, by_column, dtype = _header(file)
    values = memoryview(content)[file.tell() :]
    if len(values) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f'{info.filename}: {len(values):,} bytes for {dtype}{list(shape)}')
    return np.frombuffer(values, dtype).reshape(shape, order='F' if by_column else 'C')


def memory_mapped(file: epath.PathLike) -> np.ndarray:
    """Memory-maps the array of a local `.npy` file, read-only.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, contains Python objects, or its size differs from the header's.
    """
    try:
        with epath.Path(file).open('rb') as opened:
            shape, _, dtype = _header(opened)
            start = opened.tell()
        size = epath.Path(file).stat().length - start
        if size != math.prod(shape) * dtype.itemsize:
            raise ValueError(f'{size:,} bytes for {dtype}{list(shape)}')
        if not size:
            return np.zeros(shape, dtype)  # an empty array cannot be mapped
        return np.load(file, mmap_mode='r', allow_pickle=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # NumPy parses headers as Python literals, with any of their errors
        raise ValueError(f'{file}: damaged: {type(error).__name__}: {error}') from None


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Returns shape, whether the order is Fortran's, and a numeric dtype."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):  # later ones exist for structured dtypes with many fields
        raise ValueError(f"version {version} of NumPy's format; expected (1, 0)")
    shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.kind not in 'biuf' or not all(0 <= size < 2**63 for size in shape) or len(shape) > 32:
        raise ValueError(f'{dtype} of shape {str(shape)[:80]}; expected an array of numbers')
    return shape, by_column, dtype
