"""Training text: the Python standard library, the user's files, or a TFDS dataset.

A corpus is three random-access sequences of documents, each document a byte string. Text is never
decoded here: NUL bytes and invalid UTF-8 are kept.
"""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from experiments import shard_text
from experiments.file_documents import FileDocuments, Span, line_after, size_of
from experiments.tfds_documents import TfdsDocuments

# Fractions of the test and valid splits; the rest is for training.
_TEST, _VALID = 0.05, 0.05
# With fewer files, each file is divided among the splits.
_MIN_FILES = 3
# Excluded folders of the standard library: its tests (17 MB, half of them tables of cases) and
# installed packages.
_NOT_LIBRARY = frozenset({'site-packages', 'dist-packages', '__pycache__', 'test', 'tests'})


class Corpus(NamedTuple):
    """Documents in three splits. Every split can be pickled and opens its files lazily."""

    name: str
    train: Sequence[bytes]
    valid: Sequence[bytes]
    test: Sequence[bytes]


def open_corpus(data: str | None = None, tfds: str | None = None) -> Corpus:
    """Returns the corpus selected by the flags `--data` and `--tfds`; by default the stdlib.

    Args:
      data: a pattern for `text_files`, or a folder of shards that `tokenize` wrote.
      tfds: a dataset name for `tfds_source`.

    Raises:
      ValueError: both are given, or the selected source raises it.
    """
    if data is not None and tfds is not None:
        raise ValueError(f'--data {data} and --tfds {tfds}: give one of the two')
    if data is not None and shard_text.is_shards(data):
        return Corpus(data, *shard_text.open_splits(data))
    if data is not None:
        return text_files(data)
    if tfds is not None:
        return tfds_source(tfds)
    return standard_library()


def first_bytes(documents: Sequence[bytes], limit: int) -> list[bytes]:
    """Returns a random sample of documents of at least `limit` bytes in all, or all documents."""
    total = 0
    chosen = []
    order = np.random.default_rng(0).permutation(len(documents))
    for i in order:
        if total >= limit:
            break
        chosen.append(documents[int(i)])
        total += len(chosen[-1])
    return chosen


def standard_library() -> Corpus:
    """Returns the source code of the running interpreter's standard library, about 14 MB.

    It is available on every machine: `*.py`, except tests, installed packages and the file that
    records how this interpreter was built. A file's relative path determines its split.

    Raises:
      ValueError: the interpreter was installed without the library's source.
    """
    root = sysconfig.get_paths()['stdlib']
    names = [
        os.path.relpath(os.path.join(folder, file), root).replace(os.sep, '/')
        for folder, _, files in _walk(root)
        for file in files
        if file.endswith('.py') and not file.startswith('_sysconfigdata')
    ]
    if len(names) < _MIN_FILES:
        raise ValueError(
            f'{root}: no standard library source here; give a corpus with --data or --tfds'
        )
    return _split_files('standard_library', {name: os.path.join(root, name) for name in names})


def text_files(pattern: str) -> Corpus:
    """Returns the files matching a glob pattern, local or on `gs://`, as a corpus.

    Three or more files are split by a hash of their names (relative to the folder before the first
    wildcard). With fewer, each file is divided 90/5/5 by position, at line breaks. Files over
    64 KiB become several documents, cut at line breaks.

    Raises:
      ValueError: the pattern matches no file, or a split would be empty.
      OSError: a file cannot be read; the message names it.
    """
    files = dict(_match(pattern))
    if not files:
        hint = f'; for the files of a folder write {pattern.rstrip("/")}/*'
        raise ValueError(
            f'{pattern!r} matches no file{hint if epath.Path(pattern).is_dir() else ""}'
        )
    return _split_files(pattern, files)


def tfds_source(name: str, data_dir: epath.PathLike | None = None) -> Corpus:
    """Returns a TFDS dataset's text, downloading and preparing it if needed; no TensorFlow.

    The splits `train`, `validation` and `test` are used unchanged; each missing one is taken from
    the end of `train` (5%). The text is the feature `text`, or the only text feature.

    Args:
      name: as for `tfds.builder`: `'name'`, `'name/config'` or `'name/config:version'`.
      data_dir: folder of the datasets; the TFDS default if None.

    Raises:
      ValueError: no such dataset, no (single) text feature, no train split, or a dataset that
        cannot be prepared without TensorFlow.
    """
    if not name or name.startswith('huggingface:'):
        raise ValueError(f'{name!r}: expected a native TFDS dataset')
    import tensorflow_datasets as tfds  # takes seconds to import

    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
    except tfds.core.DatasetNotFoundError:
        near = _near(
            name.split('/')[0].split(':')[0], tfds.list_builders(with_community_datasets=False)
        )
        raise ValueError(f'{name!r}: no TFDS dataset has this name{near}') from None
    except (AssertionError, ValueError) as error:  # no such version or config
        raise ValueError(f'{name!r}: {" ".join(str(error).split())[:300]}') from None
    features = builder.info.features
    texts = [k for k in features or () if isinstance(features[k], tfds.features.Text)]
    feature = 'text' if 'text' in texts else texts[0] if len(texts) == 1 else None
    if feature is None:
        raise ValueError(
            f'{name}: expected a text feature called "text", or exactly one text feature; '
            f'found {texts or "none"} among {list(features or ())}'
        )
    try:
        builder.download_and_prepare()
    except ModuleNotFoundError as error:
        raise ValueError(
            f'{name}: preparing this dataset needs {error.name}, which is not installed; prepare '
            "it elsewhere with file_format='array_record' and point TFDS_DATA_DIR at the result"
        ) from error
    splits = _tfds_splits(name, set(builder.info.splits))
    folder = os.fspath(builder.data_path)
    return _checked(Corpus(name, *(TfdsDocuments(folder, split, feature) for split in splits)))


def _tfds_splits(name: str, present: set[str]) -> tuple[str, str, str]:
    if 'train' not in present:
        raise ValueError(f'{name}: no split "train", only {sorted(present)}')
    match 'validation' in present, 'test' in present:
        case True, True:
            return 'train', 'validation', 'test'
        case True, False:
            return 'train[:95%]', 'validation', 'train[95%:]'
        case False, True:
            return 'train[:95%]', 'train[95%:]', 'test'
    return 'train[:90%]', 'train[90%:95%]', 'train[95%:]'


def _near(name: str, names: Iterable[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, names)
    return f'; similar names: {", ".join(close)}' if close else ''


def _walk(root: str) -> Iterator[tuple[str, list[str], list[str]]]:
    for folder, folders, files in os.walk(root):
        folders[:] = [
            f for f in folders if f not in _NOT_LIBRARY and not f.endswith(('_test', '_tests'))
        ]
        yield folder, folders, files


def _match(pattern: str) -> Iterator[tuple[str, str]]:
    """Yields (name relative to the folder before the first wildcard, path) of each file."""
    parts = epath.Path(pattern).expanduser().parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    root = epath.Path(*parts[:fixed])
    if '://' not in pattern:
        matches = glob.glob(os.path.expanduser(pattern), recursive=True)
    elif '**' in pattern:
        raise ValueError(f'{pattern!r}: "**" works only on local files; list the folders')
    else:
        matches = [os.fspath(match) for match in root.glob('/'.join(parts[fixed:]))]
    for match in matches:
        path = epath.Path(match)
        if not path.is_dir():
            yield path.relative_to(root).as_posix(), match


def _fraction(name: str) -> float:
    """Returns a number in [0, 1) that depends only on the name, on any machine."""
    return int.from_bytes(hashlib.sha256(name.encode('utf-8', 'replace')).digest()[:6]) / 2**48


def _split_files(name: str, files: dict[str, str]) -> Corpus:
    """Splits files (relative name -> path) into a corpus, ordered by name."""
    sizes = {key: size_of(path) for key, path in files.items()}
    files = {key: files[key] for key in sorted(files) if sizes[key]}
    parts: tuple[list[Span], list[Span], list[Span]] = ([], [], [])
    if len(files) < _MIN_FILES:
        for key, path in files.items():
            start = 0
            for part, share in zip(parts, (1 - _VALID - _TEST, 1 - _TEST, 1.0)):
                stop = line_after(path, int(share * sizes[key]), sizes[key])
                if stop > start:
                    part.append(Span(path, start, stop))
                start = max(start, stop)
    else:
        # Thresholds on the hash decide; a split that would stay empty gets the next file.
        order = sorted(files, key=_fraction)
        low = [sum(_fraction(k) < share for k in order) for share in (_TEST, _TEST + _VALID)]
        tests = min(max(low[0], 1), len(order) - 2)
        valids = min(max(low[1], tests + 1), len(order) - 1)
        ranks = {key: rank for rank, key in enumerate(order)}
        for key, path in files.items():
            rank = ranks[key]
            part = parts[2 if rank < tests else 1 if rank < valids else 0]
            part.append(Span(path, 0, sizes[key]))
    return _checked(Corpus(name, *(FileDocuments(tuple(part)) for part in parts)))


def _checked(corpus: Corpus) -> Corpus:
    for split in ('train', 'valid', 'test'):
        if not len(getattr(corpus, split)):
            raise ValueError(
                f'{corpus.name}: the {split} split is empty: the corpus is too small to divide '
                'into train, valid and test; give more or longer files'
            )
    return corpus
