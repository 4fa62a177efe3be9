"""Plans the shards of a corpus; each is a task that any process can do independently.

OUT/plan.json     digests of text and tokenizer; others are refused in this folder
OUT/tokenizer/    a copy of the tokenizer
OUT/parts/*.json  description of a finished shard, written after the shard
OUT/index.json    all descriptions, written when no shard is missing (`lm.data.shard_index`)
"""

import dataclasses
import hashlib
import itertools
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from etils import epath

from experiments import shard_text
from experiments.corpora import Corpus
from lm.data import shard_index, shards
from lm.data.documents import id_dtype
from lm.data.shard_index import Index, Shard
from lm.files import json_fields
from tokenization import loading
from tokenization.tokenizer import Tokenizer

_SAMPLE = 64  # documents per split that are checked before the work starts
_AT_ONCE, _BYTES_AT_ONCE = 128, 1 << 22  # documents encoded together, and their bytes of text


class Text(Protocol):
    """Documents of a split that can be divided into shards without being read."""

    size: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...

    def starts(self, parts: int) -> list[int]:
        """Returns the first document of each of `parts` parts of about equal size, and the end."""
        ...

    def identity(self) -> bytes:
        """Returns a cheap fingerprint of the documents, without reading them."""
        ...


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard: can be pickled, and holds everything needed to write it.

    Attributes:
      out: folder of all shards and of the tokenizer.
      split, index, count: this is shard `index` of the split's `count` shards.
      documents: the shard's text.
    """

    out: str
    split: str
    index: int
    count: int
    documents: Sequence[bytes]

    @property
    def path(self) -> epath.Path:
        """Path of the shard."""
        return epath.Path(self.out) / shard_index.file_name(self.split, self.index, self.count)

    @property
    def part(self) -> epath.Path:
        """Path of the shard's description, in JSON."""
        return epath.Path(self.out) / 'parts' / f'{self.path.stem}.json'


class Plan(NamedTuple):
    """All shards of a corpus.

    Attributes:
      out: folder of the shards.
      vocab_size: vocabulary size of the tokenizer.
      origin: digests of the text and of the tokenizer.
      tasks: the shards, split by split.
      id_bytes: estimated bytes of all shards on disk, extrapolated from a sample.
    """

    out: epath.Path
    vocab_size: int
    origin: dict[str, str]
    tasks: list[Task]
    id_bytes: float


def make(corpus: Corpus, tokenizer: Tokenizer, shard_bytes: int, out: epath.Path) -> Plan:
    """Plans the shards of a corpus and checks the tokenizer on a sample; writes nothing.

    Raises:
      ValueError: the tokenizer is not lossless on a document of the sample.
    """
    seen, tasks, ids, size, total = hashlib.sha256(), [], 0, 0, 0
    for name in shard_text.SPLITS:
        text = cast(Text, getattr(corpus, name))
        seen.update(f'{name} {len(text)} '.encode() + text.identity())
        for i in range(0, len(text), max(math.ceil(len(text) / _SAMPLE), 1)):
            document = text[i]
            found = tokenizer.encode(document)
            if tokenizer.decode(found) != document:
                raise ValueError(
                    f'--tokenizer: {name} document {i} is not restored from its ids, so the shards '
                    'would lose text: give a lossless tokenizer'
                )
            seen.update(hashlib.sha256(document).digest())
            ids, size = ids + len(found), size + len(document)
        total += text.size
        count = max(math.ceil(text.size / shard_bytes), 1)
        edges = sorted(set(text.starts(count)))  # with few long documents, a part may be empty
        count = len(edges) - 1
        tasks += [
            Task(os.fspath(out), name, i, count, text[start:stop])
            for i, (start, stop) in enumerate(itertools.pairwise(edges))
        ]
    origin = {'text': seen.hexdigest(), shard_text.TOKENIZER: shard_text.digest(tokenizer)}
    id_bytes = total * ids / max(size, 1) * id_dtype(tokenizer.vocab_size).itemsize
    return Plan(out, tokenizer.vocab_size, origin, tasks, id_bytes)


def begin(plan: Plan, tokenizer: Tokenizer, shard_bytes: int) -> None:
    """Reserves the folder for this plan; all hosts may do so concurrently.

    Raises:
      FileExistsError: the folder holds other files.
      ValueError: it holds shards of another text, tokenizer or size, or its plan is damaged.
    """
    file = plan.out / shard_text.PLAN
    described = {'format': shard_index.FORMAT, 'shard_bytes': shard_bytes, **plan.origin}
    if file.exists():
        try:
            before = json_fields.read(file)
        except ValueError:
            raise ValueError(f'{file}: damaged; remove the folder and encode again') from None
        other = sorted(name for name in described if before.get(name) != described[name])
        if other:
            raise ValueError(
                f'{plan.out}: holds shards of another {", ".join(other)}; give another --out or '
                'remove the folder'
            )
    elif plan.out.exists() and not (_only_begun(plan.out) or file.exists()):
        raise FileExistsError(f'{plan.out}: exists and holds no shards; give another --out')
    (plan.out / 'parts').mkdir(parents=True, exist_ok=True)
    _save_once(tokenizer, plan.out / shard_text.TOKENIZER)
    shard_text.check_tokenizer(plan.out, plan.origin[shard_text.TOKENIZER])
    shard_index.write_json(file, described)


def _only_begun(out: epath.Path) -> bool:
    """Returns whether the folder was created but its plan is not written yet (kill, other host)."""
    if not out.is_dir():
        return False
    names = {path.name for path in out.iterdir() if not path.name.startswith('.')}
    return names <= {'parts', shard_text.TOKENIZER} and not any((out / 'parts').glob('*'))


def _save_once(tokenizer: Tokenizer, folder: epath.Path) -> None:
    # Saved under a unique name first, since another host may save the same tokenizer concurrently.
    if folder.exists():
        return
    partial = folder.parent / f'.{folder.name}.{os.urandom(6).hex()}.tmp'
    tokenizer.save(partial)
    try:
        partial.rename(folder)
    except OSError:
        partial.rmtree(missing_ok=True)
        if not folder.exists():
            raise


def part_of(task: Task) -> Shard | None:
    """Returns a shard's description, or None if the shard is not written yet."""
    try:
        shard = shard_index.shard_from(json_fields.read(task.part))
        return shard if task.path.stat().length == shard.file_bytes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(task: Task) -> Shard:
    """Writes one shard, loading the tokenizer from the folder, so that any process can do it.

    Raises:
      OSError, ValueError: as the documents, the tokenizer and `lm.data.shards.write_shard` do.
    """
    tokenizer = loading.load(epath.Path(task.out) / shard_text.TOKENIZER)
    shard = shards.write_shard(task.path, _encoded(tokenizer, task), tokenizer.vocab_size)
    shard_index.write_json(task.part, shard._asdict())
    return shard


def _encoded(tokenizer: Tokenizer, task: Task) -> Iterator[tuple[np.ndarray, int]]:
    """Yields each document's ids and number of bytes; holds a few MB of text at a time."""
    held: list[bytes] = []
    for i in range(len(task.documents)):
        held.append(task.documents[i])
        full = len(held) == _AT_ONCE or sum(map(len, held)) >= _BYTES_AT_ONCE
        if full or i + 1 == len(task.documents):
            yield from zip(tokenizer.encode_batch(held), map(len, held))
            held = []


def check_space(plan: Plan, missing: Sequence[Task]) -> None:
    """Raises OSError if the disk lacks space for the missing shards, as the sample predicts."""
    if '://' in os.fspath(plan.out):
        return
    needed = plan.id_bytes * len(missing) / len(plan.tasks)
    free = shutil.disk_usage(plan.out).free
    if needed > free:
        raise OSError(
            f'{plan.out}: {len(missing)} shards need about {needed / 1e9:.1f} GB, {free / 1e9:.1f} '
            'are free; free some space or give another --out'
        )


def finish(plan: Plan) -> tuple[Index, list[Task]]:
    """Writes the index if no shard is missing; returns the index so far, and missing shards."""
    found = [part_of(task) for task in plan.tasks]
    missing = [task for task, part in zip(plan.tasks, found) if part is None]
    splits: dict[str, tuple[Shard, ...]] = dict.fromkeys(shard_text.SPLITS, ())
    for task, part in zip(plan.tasks, found):
        if part is not None:
            splits[task.split] += (part,)
    index = Index(plan.vocab_size, plan.origin, splits)
    if not missing:
        shard_index.write_index(plan.out, index)
        for partial in [*plan.out.glob('.*.tmp'), *plan.out.glob('parts/.*.tmp')]:
            partial.rmtree() if partial.is_dir() else partial.unlink(
                missing_ok=True
            )  # after a kill
    return index, missing
