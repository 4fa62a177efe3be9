"""Atomic writes: files and folders appear on disk complete or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator

from etils import epath

from lm.files import json_fields


@contextlib.contextmanager
def new_folder(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a temporary folder to fill; at the end a rename puts it in the place of `path`.

    If an error interrupts the filling, an existing folder at `path` is unchanged. A kill leaves the
    old folder or the new one; or, between two renames, the old one as `path.old`.

    Raises:
      OSError: the folder could not be written; names `path`, and says what to do.
    """
    target, partial = absolute(path), being_filled(path)
    old = target.parent / f'{target.name}.old'
    partial.rmtree(missing_ok=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        old.rmtree(missing_ok=True)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        old.rmtree(missing_ok=True)
    except BaseException as error:
        partial.rmtree(missing_ok=True)
        if is_failed_write(error):
            raise OSError(f'{path}: {cannot_write(error)}') from error
        raise


@contextlib.contextmanager
def new_file(path: epath.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary local file to write; at the end an atomic rename moves it to `path`.

    Concurrent writers of `path` use separate temporary files; the last rename wins. A kill leaves
    the old file, and beside it a `.path.*.tmp`, which later writers ignore. For a bucket, the file
    is written to the local temporary directory and then copied.

    Raises:
      OSError: the file could not be written; names `path`, and says what to do.
    """
    target = absolute(path)
    on_bucket = '://' in os.fspath(path)
    folder = pathlib.Path(tempfile.gettempdir() if on_bucket else target.parent)
    partial = folder / f'.{target.name}.{uuid.uuid4().hex[:12]}.tmp'
    try:
        yield partial
        if on_bucket:  # an object appears once it is complete
            with partial.open('rb') as source, target.open('wb') as copy:
                shutil.copyfileobj(source, copy)
        else:
            partial.replace(target)
    except OSError as error:
        # an error without errno, or about a file that the caller read, is not about writing
        if error.errno is None or error.filename not in (None, str(partial), str(target)):
            raise
        raise OSError(f'{path}: {cannot_write(error)}') from error
    finally:
        partial.unlink(missing_ok=True)


def being_filled(path: epath.PathLike) -> epath.Path:
    """Returns the temporary folder that `new_folder` renames to `path` at the end."""
    target = absolute(path)
    return target.parent / f'{target.name}.tmp'


def check_replaceable(path: epath.PathLike, kind: str, field: str) -> None:
    """Refuses to replace a folder of another kind; called before the work of filling it.

    Args:
      path: the folder to be written.
      kind: its kind, as named in the error.
      field: a field of `config.json` that every folder of this kind has.

    Raises:
      FileExistsError: `path` exists and is of another kind.
    """
    target = absolute(path)
    if not target.exists():
        return
    try:
        described = json_fields.read(target / 'config.json')
    except (OSError, ValueError):
        described = {}
    if field not in described:
        raise FileExistsError(
            f'{path}: exists and is not a {kind} (its config.json is missing or not that of one)'
        )


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns a path as Orbax requires it: local paths absolute, `gs://` paths unchanged."""
    return epath.Path(path) if '://' in os.fspath(path) else epath.Path(path).resolve()


def is_failed_write(error: BaseException) -> bool:
    """Returns whether an error means that a file could not be written.

    tensorstore reports a full disk as a ValueError.
    """
    return isinstance(error, OSError) or 'RESOURCE_EXHAUSTED' in str(error)


def cannot_write(error: BaseException) -> str:
    """Returns why a file could not be written, and what the user can do."""
    reason = getattr(error, 'strerror', None) or str(error).strip().partition('\n')[0]
    return f'could not be written: {reason}; free some space there, or write elsewhere'
