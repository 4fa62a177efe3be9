"""The index of a folder of shards: `index.json`, written once all shards exist."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from lm.data.documents import id_dtype
from lm.files import atomic, json_fields

FORMAT = 1
INDEX = 'index.json'


class Shard(NamedTuple):
    """The contents of one file.

    Attributes:
      documents: records.
      tokens: ids of all documents.
      bytes: size of the text they encode.
      file_bytes: size of the file.
      sha256: of the file, in hex.
    """

    documents: int
    tokens: int
    bytes: int
    file_bytes: int
    sha256: str


class Index(NamedTuple):
    """The contents of a folder of shards.

    Attributes:
      vocab_size: upper bound of the ids, exclusive.
      origin: digests of the sources of the shards, by name.
      splits: the shards of each split, in order.
    """

    vocab_size: int
    origin: dict[str, str]
    splits: dict[str, tuple[Shard, ...]]


def file_name(split: str, index: int, count: int) -> str:
    """Returns the name of shard number `index` of `count`."""
    return f'{split}-{index:05d}-of-{count:05d}.array_record'


def write_index(folder: epath.PathLike, index: Index) -> None:
    """Writes `index.json`, which makes a folder with all its shards readable."""
    splits = {name: [shard._asdict() for shard in found] for name, found in index.splits.items()}
    described = {'format': FORMAT, 'dtype': id_dtype(index.vocab_size).name, **index._asdict()}
    write_json(epath.Path(folder) / INDEX, {**described, 'splits': splits})


def read_index(folder: epath.PathLike) -> Index:
    """Returns the index of a folder of shards.

    Raises:
      FileNotFoundError: `folder` has no shards, or not all of them yet.
      ValueError: the index is damaged, or in a format that this version does not know.
    """
    file = epath.Path(folder) / INDEX
    if not file.exists():
        raise FileNotFoundError(
            f'{folder}: no shards here ({INDEX} is missing; it is written when all of them are)'
        )
    described = json_fields.read(file)
    try:
        version = described['format']
        if version != FORMAT:
            raise ValueError(f'format {version!r}; this version reads format {FORMAT}')
        vocab_size, origin = described['vocab_size'], described['origin']
        splits = {
            str(name): tuple(shard_from(fields) for fields in found)
            for name, found in described['splits'].items()
        }
        if not (type(vocab_size) is int and 1 <= vocab_size < 2**31):
            raise ValueError(f'vocab_size {vocab_size!r}; expected 1 to 2**31 - 1')
        if described['dtype'] != id_dtype(vocab_size).name:
            raise ValueError(f'dtype {described["dtype"]!r} for {vocab_size} ids')
        if not all(isinstance(value, str) for value in dict(origin).values()):
            raise ValueError('origin: expected names and digests')
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f'{error} is missing' if isinstance(error, KeyError) else error
        raise ValueError(f'{file}: damaged, or not an index of shards: {reason}') from None
    return Index(vocab_size, dict(origin), splits)


def shard_from(fields: Mapping[str, Any]) -> Shard:
    """Returns a shard from its JSON; raises ValueError, KeyError or TypeError if invalid.

    No count may exceed the size of the file.
    """
    shard = Shard(**{name: fields[name] for name in Shard._fields})
    counts = shard[:4]
    if not all(type(n) is int and 0 <= n < 2**53 for n in counts) or type(shard.sha256) is not str:
        raise ValueError(f'expected integers and a digest, got {tuple(shard)!r:.200}')
    if max(shard.documents, shard.tokens) > shard.file_bytes:
        raise ValueError(
            f'{shard.documents} documents, {shard.tokens} ids in {shard.file_bytes} bytes'
        )
    return shard


def write_json(path: epath.PathLike, value: Mapping[str, Any]) -> None:
    """Writes JSON with sorted keys; the file appears only once it is complete."""
    with atomic.new_file(path) as partial:
        partial.write_text(json.dumps(value, indent=1, sort_keys=True) + '\n')
