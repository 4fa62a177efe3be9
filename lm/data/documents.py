"""Random-access documents of ids: the protocol, and documents encoded once, on disk."""

import functools
import pathlib
from collections.abc import Iterable
from typing import Any, BinaryIO, Protocol

import numpy as np
from etils import epath

from lm.files import array_files, atomic


class Documents(Protocol):
    """Random-access documents: bytes, or arrays of ids that need no encoding."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class EncodedDocuments:
    """Documents encoded once: vectors of ids, memory-mapped from a local folder.

    The folder holds `ids.npy` (all ids end to end, in the smallest of uint8, uint16 and int32 that
    fits the vocabulary) and `offsets.npy` (int64: where each document starts, and the end). The
    files are opened on first use, in each process.
    """

    def __init__(self, folder: epath.PathLike):
        """Opens no file yet; raises FileNotFoundError if `write` did not finish the folder."""
        _check_local(folder)
        self._folder = pathlib.Path(folder)
        for name in ('ids.npy', 'offsets.npy'):
            if not (self._folder / name).exists():
                raise FileNotFoundError(f'{folder}: no encoded documents here ({name} is missing)')

    @classmethod
    def write(
        cls, folder: epath.PathLike, documents: Iterable[np.ndarray], vocab_size: int
    ) -> 'EncodedDocuments':
        """Writes vectors of ids, one at a time, into a folder that appears once complete.

        Raises:
          FileExistsError: the folder exists.
          ValueError: a document is not a vector of integers in [0, vocab_size); names it.
        """
        _check_local(folder)
        folder = pathlib.Path(folder)
        if folder.exists():
            raise FileExistsError(f'{folder}: exists; remove it to encode the documents again')
        with atomic.new_folder(folder) as partial:
            sizes = [0]
            with (partial / 'ids.npy').open('wb') as file:
                dtype = id_dtype(vocab_size)
                _write_header(file, 0, dtype)
                for index, document in enumerate(documents):
                    ids = checked_ids(index, document, vocab_size)
                    file.write(ids.astype(dtype).tobytes())
                    sizes.append(len(ids))
                file.seek(0)
                _write_header(file, sum(sizes), dtype)
            np.save(partial / 'offsets.npy', np.cumsum(sizes, dtype=np.int64))
        return cls(folder)

    @functools.cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        offsets = np.array(array_files.memory_mapped(self._folder / 'offsets.npy'))
        ids = array_files.memory_mapped(self._folder / 'ids.npy')
        again = f'{self._folder}: damaged encoded documents: {{}}; remove the folder, encode again'
        if offsets.dtype != np.int64 or offsets.ndim != 1 or not len(offsets) or ids.ndim != 1:
            raise ValueError(again.format(f'{offsets.dtype}{offsets.shape}, {ids.shape}'))
        if ids.dtype not in (np.uint8, np.uint16, np.int32):
            raise ValueError(again.format(f'ids.npy holds {ids.dtype}'))
        if offsets[0] or np.any(offsets[1:] < offsets[:-1]):
            raise ValueError(again.format('offsets.npy does not increase from 0'))
        if len(ids) != offsets[-1]:
            raise ValueError(
                again.format(f'offsets.npy ends at {offsets[-1]}, ids.npy has {len(ids)}')
            )
        return ids, offsets

    def __getstate__(self) -> dict[str, Any]:
        return {'_folder': self._folder}

    def __len__(self) -> int:
        return len(self._arrays[1]) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns the ids of a document, `[T]`, read-only."""
        ids, offsets = self._arrays
        if not -len(self) <= index < len(self):
            raise IndexError(f'document {index} of {len(self)}')
        index %= len(self)
        return np.asarray(ids[offsets[index] : offsets[index + 1]])

    @property
    def tokens(self) -> int:
        """Number of ids in all documents."""
        return int(self._arrays[1][-1])


def id_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest of uint8, uint16 and int32, little-endian, that holds every id."""
    return np.dtype('u1' if vocab_size <= 1 << 8 else '<u2' if vocab_size <= 1 << 16 else '<i4')


def checked_ids(index: int, document: Any, vocab_size: int, codebooks: int = 1) -> np.ndarray:
    """Returns a document's ids: `[T]`, or `[T, Q]` of Q codebooks.

    Raises:
      ValueError: they have another shape, are not integers, or lie outside of [0, vocab_size);
        names the document.
    """
    ids = np.asarray(document)
    shaped = ids.ndim == 1 if codebooks == 1 else ids.ndim == 2 and ids.shape[1] == codebooks
    if not shaped or (ids.size and ids.dtype.kind not in 'iu'):
        expected = 'a vector' if codebooks == 1 else f'[T, {codebooks}]'
        raise ValueError(
            f'document {index}: expected {expected} of integer ids, got {ids.dtype} of shape '
            f'{ids.shape}'
        )
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise ValueError(
            f'document {index}: ids must lie in [0, {vocab_size}), found {ids.min()} to '
            f'{ids.max()}; was it encoded with another tokenizer?'
        )
    return ids


def _check_local(folder: epath.PathLike) -> None:
    if '://' in str(folder):
        raise ValueError(f'{folder}: encoded documents are memory-mapped: give a local folder')


def _write_header(file: BinaryIO, count: int, dtype: np.dtype) -> None:
    # numpy pads headers for a growing length, so that a header can be overwritten.
    header = {'descr': dtype.str, 'fortran_order': False, 'shape': (count,)}
    np.lib.format.write_array_header_1_0(file, header)
