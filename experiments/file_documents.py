"""Documents that are stretches of files, on a local disk or a bucket, read when asked for."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

# Longer files are cut into documents of at most this many bytes: short enough that shuffling
# documents mixes a book, long enough that the context lost at a cut does not matter.
MAX_DOCUMENT = 1 << 16
# How far before such a cut a line break is looked for; a longer line is cut in its middle.
_LOOK_BACK = 1 << 13


class Span(NamedTuple):
    """The bytes `[start, stop)` of a file."""

    path: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class FileDocuments(Sequence[bytes]):
    """Documents that are stretches of files, read when they are asked for."""

    spans: tuple[Span, ...]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: Any) -> Any:
        """Returns the bytes of one document, or `FileDocuments` for a slice.

        Raises:
          OSError: the file cannot be read; names it.
          ValueError: the file became shorter since the corpus was opened.
        """
        if isinstance(index, slice):
            return FileDocuments(self.spans[index])
        path, start, stop = self.spans[index]
        data = _read(path, start, stop)
        if len(data) != stop - start:
            raise ValueError(f'{path}: shorter than when the corpus was opened; open it again')
        return data


def cut(path: str, start: int, stop: int) -> Iterator[Span]:
    """Yields `[start, stop)` of a file as documents, cut at line breaks where there are any."""
    while stop - start > MAX_DOCUMENT:
        end = start + MAX_DOCUMENT
        tail = _read(path, end - _LOOK_BACK, end)
        middle = end - _LOOK_BACK + tail.rfind(b'\n') + 1 if b'\n' in tail else end
        yield Span(path, start, middle)
        start = middle
    if stop > start:
        yield Span(path, start, stop)


def line_after(path: str, position: int, size: int) -> int:
    """Returns the first line start at or after `position`, or `position` where lines are long."""
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
    # Local files are also asked for permission now: training must not stop at one of them.
    if '://' not in path and not os.access(path, os.R_OK):
        raise PermissionError(f'{path}: no permission to read this file')
    return size


def _unreadable(path: str, error: OSError) -> OSError:
    return type(error)(f'{path}: cannot be read: {error.strerror or error}')
