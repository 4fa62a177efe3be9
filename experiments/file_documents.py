"""Documents that are byte ranges of files, on a local disk or in a bucket, read lazily."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

# Longer spans are cut into documents of at most this many bytes: short enough that shuffling
# documents mixes a book, long enough that the context lost at a cut does not matter.
MAX_DOCUMENT = 1 << 16
# Bytes before a cut that are searched for a line break; a longer line is cut in its middle.
_LOOK_BACK = 1 << 13
# Cut k of a span is the last line break in the _LOOK_BACK bytes before k * _STEP. The number of
# documents thus follows from the file size, and nothing is read until a document is requested.
_STEP = MAX_DOCUMENT - _LOOK_BACK


class Span(NamedTuple):
    """The bytes `[start, stop)` of a file."""

    path: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class FileDocuments(Sequence[bytes]):
    """Documents that are byte ranges of files, cut at line breaks and read lazily.

    Memory grows with the number of files, not with their sizes.

    Attributes:
      spans: the byte ranges; a span longer than `MAX_DOCUMENT` is several documents.
      first, last: half-open range of the spans' documents; `last=None` is the end.
    """

    spans: tuple[Span, ...]
    first: int = 0
    last: int | None = None

    def __len__(self) -> int:
        return self._stop - self.first

    def __getitem__(self, index: Any) -> Any:
        """Returns the bytes of one document, or `FileDocuments` for a slice of step 1.

        Raises:
          OSError: the file cannot be read; the message names it.
          ValueError: the file has become shorter since the corpus was opened.
        """
        if isinstance(index, slice):
            start, stop = contiguous(index, len(self))
            return self._between(self.first + start, self.first + stop)
        if not -len(self) <= index < len(self):
            raise IndexError(f'document {index} of {len(self)}')
        index = self.first + index % len(self)
        at = int(np.searchsorted(self._ends, index, side='right'))
        return _document(self.spans[at], index - int(self._ends[at - 1] if at else 0))

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        return np.array([stop - start for _, start, stop in self.spans], np.int64)

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """Cumulative number of documents, by span."""
        return np.cumsum(-(-self._sizes // _STEP))

    @property
    def _stop(self) -> int:
        everything = int(self._ends[-1]) if self.spans else 0
        return everything if self.last is None else self.last

    def _between(self, start: int, stop: int) -> 'FileDocuments':
        """Returns documents `[start, stop)` of `spans`, keeping only the spans that hold some."""
        low = int(np.searchsorted(self._ends, start, side='right'))
        high = int(np.searchsorted(self._ends, stop, side='left')) + 1 if stop > start else low
        skipped = int(self._ends[low - 1]) if low else 0
        return FileDocuments(self.spans[low:high], start - skipped, stop - skipped)

    def __getstate__(self) -> dict[str, Any]:
        return {'spans': self.spans, 'first': self.first, 'last': self.last}

    @property
    def size(self) -> int:
        """Total bytes of all spans."""
        return int(self._sizes.sum())

    def starts(self, parts: int) -> list[int]:
        """Returns the first document of each of `parts` parts of about equal bytes, and the end."""
        sizes = np.concatenate([[0], np.cumsum(self._sizes)])
        places = np.arange(parts) * self.size // parts
        at = np.searchsorted(sizes, places, side='right') - 1
        before = np.concatenate([[0], self._ends])[at]
        return [*(before + (places - sizes[at]) // _STEP).tolist(), len(self)]

    def identity(self) -> bytes:
        """Returns a cheap fingerprint of the documents, without reading them: the span sizes."""
        return self._sizes.astype('<i8').tobytes()


def contiguous(index: slice, size: int) -> tuple[int, int]:
    """Returns the start and stop of a slice; raises ValueError unless its step is 1."""
    start, stop, step = index.indices(size)
    if step != 1:
        raise ValueError(f'documents[{index}]: expected a step of 1')
    return start, max(start, stop)


def _document(span: Span, number: int) -> bytes:
    """Reads one document of a span; also reads the bytes before it that may hold its first cut."""
    path, start, stop = span
    begin = start + max(number * _STEP - _LOOK_BACK, 0)
    end = min(start + (number + 1) * _STEP, stop)
    data = _read(path, begin, end)
    if len(data) != end - begin:
        raise ValueError(f'{path}: shorter than when the corpus was opened; open it again')
    low = _cut(data, _LOOK_BACK) if number else 0
    return data[low : len(data) if end == stop else _cut(data, len(data))]


def _cut(data: bytes, end: int) -> int:
    """Returns the last line start in the `_LOOK_BACK` bytes before `end`, or `end`."""
    return (data.rfind(b'\n', end - _LOOK_BACK, end) + 1) or end


def line_after(path: str, position: int, size: int) -> int:
    """Returns the first line start at or after `position`, or `position` if there is none near."""
    if position in (0, size):
        return position
    ahead = _read(path, position - 1, min(size, position + MAX_DOCUMENT))
    return position + ahead.find(b'\n') if b'\n' in ahead else position


def _read(path: str, start: int, stop: int) -> bytes:
    try:
        with epath.Path(path).open('rb') as file:
            file.seek(start)
            return file.read(stop - start)
    except OSError as error:
        raise _unreadable(path, error) from None


def size_of(path: str) -> int:
    """Returns the size of a file in bytes; raises OSError, naming it, if it cannot be read."""
    try:
        size = epath.Path(path).stat().length
    except OSError as error:
        raise _unreadable(path, error) from None
    # Check read permission now, so that training does not stop at an unreadable file.
    if '://' not in path and not os.access(path, os.R_OK):
        raise PermissionError(f'{path}: no permission to read this file')
    return size


def _unreadable(path: str, error: OSError) -> OSError:
    return type(error)(f'{path}: cannot be read: {error.strerror or error}')
