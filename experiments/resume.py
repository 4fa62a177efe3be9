"""Parts of a long run that are made once and found again when the run is resumed.

Of several processes the first one makes what takes no accelerator; the others wait, and read it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from experiments import report
from experiments.corpora import Corpus
from experiments.shard_text import ShardText
from lm.data.documents import EncodedDocuments
from lm.data.shards import ShardedDocuments
from lm.devices import processes
from lm.files import json_fields
from lm.training.metrics import ProgressLine
from tokenization import loading
from tokenization.tokenizer import Tokenizer

_ENCODE_AT_ONCE = 128
_SAMPLE = 64


def claim(out: epath.Path, config: Any) -> None:
    """Makes `out` the folder of this config.

    Raises:
      ValueError: it holds parts of a run with another config, which must not be mixed; or it is
        not a local folder.
    """
    if '://' in os.fspath(out):
        raise ValueError(f'--out {out}: a run that can be resumed needs a local folder')
    file = out / 'started.json'
    fields = json.loads(report.to_json(config))
    count = jax.process_count()
    if file.exists():
        before = json_fields.read(file)
        if before.get('processes', 1) != count:
            raise ValueError(
                f'{out}: holds a run of {before.get("processes", 1)} processes, and here are '
                f'{count}; start as many, since each has a place of its own in the data'
            )
        other = sorted(
            name for name in fields if name in before and _differs(before[name], fields[name])
        )
        if other:
            raise ValueError(
                f'{out}: holds a run with another {", ".join(other)}; give another --out, or '
                'remove the folder'
            )
    report.write_json_atomic(file, {**fields, 'processes': count} if count > 1 else fields)


def _differs(before: Any, now: Any) -> bool:
    """Returns whether a setting has changed; one that an older version did not have has not."""
    if isinstance(before, dict) and isinstance(now, dict):
        return any(name not in now or _differs(before[name], now[name]) for name in before)
    return before != now


def claim_corpus(out: epath.Path, corpus: Corpus) -> None:
    """Makes `out` the folder of this text, known by its size and a sample of its documents.

    Raises:
      ValueError: the files behind the same name have changed since the run was started.
    """
    seen = hashlib.sha256()
    for split in (corpus.train, corpus.valid, corpus.test):
        seen.update(f'{len(split)} '.encode())
        for i in range(0, len(split), max(len(split) // _SAMPLE, 1)):
            seen.update(hashlib.sha256(split[i]).digest())
    file = out / 'corpus.json'
    fields = {'name': corpus.name, 'sha256_of_sample': seen.hexdigest()}
    if file.exists() and json_fields.read(file) != fields:
        raise ValueError(
            f'{out}: holds a run on other text than {corpus.name} has now; give another --out, or '
            'remove the folder'
        )
    report.write_json_atomic(file, fields)


def tokenizer_once(folder: epath.Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    """Returns the tokenizer saved in `folder`, or makes it and saves it there."""
    if processes.is_first() and not folder.exists():
        make().save(folder)
    processes.wait(os.fspath(folder))
    return loading.load(folder)


def encoded_once(
    tokenizer: Tokenizer, documents: Sequence[bytes], folder: epath.Path, label: str
) -> EncodedDocuments | ShardedDocuments:
    """Returns the ids of documents; encodes them into `folder`, unless it holds them already.

    Shards of the same tokenizer are the ids.
    """
    if isinstance(documents, ShardText) and documents.made_by(tokenizer):
        return documents.ids
    if processes.is_first() and not folder.exists():
        with ProgressLine(label, len(documents)) as progress:

            def ids():
                for i in range(0, len(documents), _ENCODE_AT_ONCE):
                    progress.update(i)
                    last = min(i + _ENCODE_AT_ONCE, len(documents))
                    yield from tokenizer.encode_batch([documents[j] for j in range(i, last)])

            EncodedDocuments.write(folder, ids(), tokenizer.vocab_size)
    processes.wait(os.fspath(folder))
    return EncodedDocuments(folder)


def part_once(file: epath.Path, make: Callable[[], Any]) -> Any:
    """Returns what a part of a run came to, as JSON: `file`'s content, or what is made now.

    All processes make it together, so that it may compute on all devices.

    Raises:
      ValueError: the file is damaged; names it. Removed, it is made again.
    """
    if not processes.agree(file.exists()):
        made = make()
        if processes.is_first():
            file.parent.mkdir(parents=True, exist_ok=True)
        report.write_json_atomic(file, made)
        processes.wait(os.fspath(file))
    return json_fields.read_value(file)
