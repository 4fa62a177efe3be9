"""Folders and files that appear on disk whole, or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator

from etils import epath

from lm.files import json_fields


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns a local path as an absolute one, which Orbax asks for; `gs://` paths are."""
    return epath.Path(path) if '://' in os.fspath(path) else epath.Path(path).resolve()


def check_replaceable(path: epath.PathLike, kind: str, field: str) -> None:
    """Refuses to replace a folder of another kind, before the work of filling it.

    Args:
      path: where a folder is to appear.
      kind: what it will hold, as the error names it.
      field: which `config.json` has in a folder of that kind.

    Raises:
      FileExistsError: `path` is there, and is of another kind.
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
            f'{path}: exists and is no {kind} (its config.json is missing or of something else)'
        )


def being_filled(path: epath.PathLike) -> epath.Path:
    """Returns the folder that `new_folder` fills before it takes the place of `path`."""
    target = absolute(path)
    return target.parent / f'{target.name}.tmp'


@contextlib.contextmanager
def new_folder(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a folder to fill; at the end it takes the place of `path`.

    If filling it fails, an older folder at `path` stays as it was. A kill leaves the older one or
    the newer one, or, in the moment between two renames, the older one as `path.old`.

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
    """Yields a local file to write; at the end it takes the place of `path`.

    Whoever else writes `path` at the same time writes a file of its own: the last one stays. A kill
    leaves the older file, and beside it one called `.path.*.tmp`, which the next writer need not
    know. A file on a bucket is written into a temporary folder first.

    Raises:
      OSError: the file could not be written; names `path`, and says what to do.
    """
    target = absolute(path)
    on_bucket = '://' in os.fspath(path)
    folder = pathlib.Path(tempfile.gettempdir() if on_bucket else target.parent)
    partial = folder / f'.{target.name}.{uuid.uuid4().hex[:12]}.tmp'
    try:
        yield partial
        if on_bucket:  # an object appears when it is whole
            with partial.open('rb') as source, target.open('wb') as copy:
                shutil.copyfileobj(source, copy)
        else:
            partial.replace(target)
    except OSError as error:
        # not what the caller may have read for it: that error names another file, or has no number
        if error.errno is None or error.filename not in (None, str(partial), str(target)):
            raise
        raise OSError(f'{path}: {cannot_write(error)}') from error
    finally:
        partial.unlink(missing_ok=True)


def is_failed_write(error: BaseException) -> bool:
    """Returns whether an error says that a file could not be written.

    tensorstore reports a full disk as a ValueError.
    """
    return isinstance(error, OSError) or 'RESOURCE_EXHAUSTED' in str(error)


def cannot_write(error: BaseException) -> str:
    """Returns what kept a file from being written, and what the user can do."""
    reason = getattr(error, 'strerror', None) or str(error).strip().partition('\n')[0]
    return f'could not be written: {reason}; free some space there, or write elsewhere'
