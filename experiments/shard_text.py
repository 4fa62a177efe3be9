"""Shards of ids as a text corpus: the tokenizer is lossless, so the text is decoded from them."""

import dataclasses
import functools
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from experiments.file_documents import contiguous
from lm.data import shard_index
from lm.data.shards import ShardedDocuments
from tokenization import loading
from tokenization.tokenizer import Tokenizer

SPLITS = ('train', 'valid', 'test')
TOKENIZER = 'tokenizer'  # folder beside the shards, and key of its digest in the index
PLAN = 'plan.json'  # the first file that `tokenize` writes


@dataclasses.dataclass(frozen=True)
class ShardText(Sequence[bytes]):
    """The text of one split of a folder that `tokenize` wrote, decoded lazily.

    Attributes:
      folder, split: location of the shards.
      first, last: half-open range of documents; `last=None` is the end.
    """

    folder: str
    split: str
    first: int = 0
    last: int | None = None

    @functools.cached_property
    def ids(self) -> ShardedDocuments:
        """The ids of all documents of the split."""
        return ShardedDocuments(self.folder, self.split)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids."""
        return loading.load(epath.Path(self.folder) / TOKENIZER)

    def made_by(self, tokenizer: Tokenizer) -> bool:
        """Returns whether this is the whole split and `tokenizer` made its ids."""
        whole = self.first == 0 and self.last is None
        return whole and shard_index.read_index(self.folder).origin[TOKENIZER] == digest(tokenizer)

    def __len__(self) -> int:
        return (len(self.ids) if self.last is None else self.last) - self.first

    def __getitem__(self, index: Any) -> Any:
        """Returns the bytes of one document, or `ShardText` for a slice of step 1."""
        if isinstance(index, slice):
            start, stop = contiguous(index, len(self))
            return ShardText(self.folder, self.split, self.first + start, self.first + stop)
        if not -len(self) <= index < len(self):
            raise IndexError(f'document {index} of {len(self)}')
        return self.tokenizer.decode(self.ids[self.first + index % len(self)])

    def __getstate__(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def size(self) -> int:
        """Bytes of text of the whole split."""
        return self.ids.text_bytes

    def starts(self, parts: int) -> list[int]:
        """Returns the first document of each of `parts` parts with equal counts, and the end."""
        return [i * len(self) // parts for i in range(parts + 1)]

    def identity(self) -> bytes:
        """Returns a cheap fingerprint of the documents, without reading them."""
        found = shard_index.read_index(self.folder).splits[self.split]
        return ' '.join(shard.sha256 for shard in found).encode()


def is_shards(folder: epath.PathLike) -> bool:
    """Returns whether `tokenize` created this folder, complete or not."""
    path = epath.Path(folder)
    return any((path / name).exists() for name in (PLAN, shard_index.INDEX))


def open_splits(folder: epath.PathLike) -> tuple[ShardText, ...]:
    """Returns the splits of a folder of shards; checks that it is complete.

    Raises:
      FileNotFoundError, ValueError: as in `ShardedDocuments`, `tokenization.loading.load` and
        `check_tokenizer`.
    """
    splits = tuple(ShardText(str(folder), name) for name in SPLITS)
    for split in splits:
        split.ids  # noqa: B018 (reads the index)
    check_tokenizer(folder, shard_index.read_index(folder).origin.get(TOKENIZER))
    splits[0].tokenizer  # noqa: B018 (reads it)
    return splits


def check_tokenizer(folder: epath.PathLike, expected: str | None) -> None:
    """Raises ValueError unless the tokenizer beside the shards has the expected digest."""
    path = epath.Path(folder) / TOKENIZER
    if _digest_of_files(path) != expected:
        raise ValueError(f'{path}: not the tokenizer that made these shards; copy that one here')


def digest(tokenizer: Tokenizer) -> str:
    """Returns a hex SHA-256 of all files that a tokenizer saves."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(epath.Path(folder) / TOKENIZER)
        return _digest_of_files(epath.Path(folder) / TOKENIZER)


def _digest_of_files(folder: epath.Path) -> str:
    names = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    seen = hashlib.sha256()
    for name in sorted(names):
        seen.update(name.encode() + b'\0' + hashlib.sha256(names[name].read_bytes()).digest())
    return seen.hexdigest()


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path
