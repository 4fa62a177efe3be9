"""Parts of a long run that are made once and found again when the run is resumed."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

import tokenization
from experiments import report
from lm.data import EncodedDocuments
from lm.metrics import ProgressLine
from tokenization.tokenizer import Tokenizer

_ENCODE_AT_ONCE = 128
_DONE = 'done'  # written last: a folder without it was left by a kill


def claim(out: epath.Path, config: Any) -> None:
    """Makes `out` the folder of this config.

    Raises:
      ValueError: it holds parts of a run with another config, which must not be mixed.
    """
    file = out / 'started.json'
    fields = json.loads(report.to_json(config))
    if file.exists():
        before = json.loads(file.read_text())
        other = sorted(name for name in fields if before.get(name) != fields[name])
        if other:
            raise ValueError(
                f'{out}: holds a run with another {", ".join(other)}; give another --out, or '
                'remove the folder'
            )
    report.write_json_atomic(file, fields)


def tokenizer_once(folder: epath.Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    """Returns the tokenizer saved in `folder`, or makes it and saves it there."""
    if (folder / _DONE).exists():
        return tokenization.load(folder)
    tokenizer = make()
    tokenizer.save(folder)
    (folder / _DONE).write_text('')
    return tokenizer


def encoded_once(
    tokenizer: Tokenizer, documents: Sequence[bytes], folder: epath.Path, label: str
) -> EncodedDocuments:
    """Returns the ids of documents, memory-mapped; encodes them unless `folder` holds them."""
    if not folder.exists():
        with ProgressLine(label, len(documents)) as progress:

            def ids():
                for i in range(0, len(documents), _ENCODE_AT_ONCE):
                    progress.update(i)
                    last = min(i + _ENCODE_AT_ONCE, len(documents))
                    yield from tokenizer.encode_batch([documents[j] for j in range(i, last)])

            EncodedDocuments.write(folder, ids(), tokenizer.vocab_size)
    return EncodedDocuments(folder)
