"""Parts of a long run that are saved once and reloaded when the run resumes.

In a multi-process run, process 0 makes the parts that need no accelerator; the others wait for it
and then read them.
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
    """Reserves the folder `out` for runs of this config.

    Raises:
      ValueError: `out` holds parts of a run with another config, or is not a local folder.
    """
    if '://' in os.fspath(out):
        raise ValueError(f'--out {out}: a resumable run needs a local folder')
    file = out / 'started.json'
    fields = json.loads(report.to_json(config))
    count = jax.process_count()
    if file.exists():
        before = json_fields.read(file)
        if before.get('processes', 1) != count:
            raise ValueError(
                f'{out}: holds a run of {before.get("processes", 1)} processes, but there are '
                f'{count}; start the same number, since each keeps its own position in the data'
            )
        other = sorted(
            name for name in fields if name in before and _differs(before[name], fields[name])
        )
        if other:
            raise ValueError(
                f'{out}: holds a run with another {", ".join(other)}; give another --out or '
                'remove the folder'
            )
    report.write_json_atomic(file, {**fields, 'processes': count} if count > 1 else fields)


def _differs(before: Any, now: Any) -> bool:
    """Returns whether a setting has changed; a setting missing from `before` has not."""
    if isinstance(before, dict) and isinstance(now, dict):
        return any(name not in now or _differs(before[name], now[name]) for name in before)
    return before != now


def claim_corpus(out: epath.Path, corpus: Corpus) -> None:
    """Reserves `out` for this corpus, identified by its size and a sample of its documents.

    Raises:
      ValueError: the corpus has changed since the run was started.
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
            f'{out}: holds a run on an older text of {corpus.name}; give another --out or remove '
            'the folder'
        )
    report.write_json_atomic(file, fields)


def tokenizer_once(folder: epath.Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    """Returns the tokenizer saved in `folder`; makes and saves it there if there is none."""
    if processes.is_first() and not folder.exists():
        make().save(folder)
    processes.wait(os.fspath(folder))
    return loading.load(folder)


def encoded_once(
    tokenizer: Tokenizer, documents: Sequence[bytes], folder: epath.Path, label: str
) -> EncodedDocuments | ShardedDocuments:
    """Returns the ids of documents; encodes them into `folder` unless they are there already.

    Documents that are shards of the same tokenizer are not encoded again.
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
    """Returns a JSON result of a part of the run: loaded from `file`, or made and saved there.

    All processes make it together, so `make` may use all devices.

    Raises:
      ValueError: the file is damaged; the message names it. Remove it to make it again.
    """
    if not processes.agree(file.exists()):
        made = make()
        if processes.is_first():
            file.parent.mkdir(parents=True, exist_ok=True)
        report.write_json_atomic(file, made)
        processes.wait(os.fspath(file))
    return json_fields.read_value(file)
