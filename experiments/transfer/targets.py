"""The target tokenizers of the transfer."""

import dataclasses
import glob
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from experiments import resume
from experiments.corpora import Corpus
from experiments.lexinvariant import domains
from experiments.transfer.config import Config, Target
from lm.training.metrics import ProgressLine
from tokenization.coding import ngram
from tokenization.equal_info import compiler
from tokenization.tokenizer import Tokenizer
from tokenization.vocabularies import patterns
from tokenization.vocabularies.bpe import BPETokenizer
from tokenization.vocabularies.byte import ByteTokenizer
from tokenization.vocabularies.longest_match import Strings
from tokenization.vocabularies.table import TableTokenizer

_FOLDER = pathlib.Path(__file__).parent
_FILES = {'gpt2': ('gpt2', 'r50k_base'), 'cl100k': ('cl100k', 'cl100k_base')}
_WINDOW_BYTES, _NGRAM_ORDER = 256, 3


def build(config: Config, corpus: Corpus, out: epath.Path) -> dict[Target, Tokenizer]:
    """Returns the targets, loading those that an earlier run saved in `out`."""
    makers: dict[Target, Callable[[], Tokenizer]] = {
        'bpe_same': lambda: BPETokenizer.train(
            _half(corpus.train), config.vocab_size, patterns.CL100K_PATTERN
        ),
        'bpe_4x': lambda: BPETokenizer.train(corpus.train, 4 * config.vocab_size),
        'bpe_code': lambda: BPETokenizer.train(_code(corpus), config.vocab_size),
        'gpt2': lambda: _released(config, 'gpt2', patterns.GPT2_PATTERN),
        'cl100k': lambda: _released(config, 'cl100k', patterns.CL100K_PATTERN),
        'bytes': ByteTokenizer,
        'equal_info': lambda: distinct(_equal_info(corpus.train)),
    }
    found = {}
    with ProgressLine('building tokenizers', len(config.targets)) as progress:
        for i, target in enumerate(config.targets):
            progress.update(i, target)
            found[target] = resume.tokenizer_once(out / 'tokenizers' / target, makers[target])
        progress.update(len(config.targets))
    return found


def _half(documents: Sequence[bytes]) -> list[bytes]:
    return [documents[i] for i in range(0, len(documents), 2)]


def _code(corpus: Corpus) -> list[bytes]:
    return [domains.code(corpus.train[i]) for i in range(len(corpus.train))]


def _released(config: Config, target: str, pattern: str) -> BPETokenizer:
    """Returns a released vocabulary: that of `--ranks`, or its first 5,000 tokens."""
    files = sorted(epath.Path(path) for path in glob.glob(config.ranks or ''))
    named = [file for file in files if file.stem in _FILES[target]]
    return BPETokenizer.from_tiktoken_file(
        named[0] if named else _FOLDER / f'{target}_5000.tiktoken', pattern
    )


def _equal_info(documents: Sequence[bytes]) -> TableTokenizer:
    model = ngram.count(documents, _NGRAM_ORDER).model()
    return compiler.compile_equal_info(model, 'canonical', _WINDOW_BYTES)


def distinct(codec: TableTokenizer) -> TableTokenizer:
    """Returns the codec without the codes that it never writes, so that each string has one id.

    A model transferred to it thus splits no probability between two ids of one string.
    """
    strings = Strings.of([codec.strings[i] for i in np.flatnonzero(codec.written).tolist()])
    return dataclasses.replace(codec, strings=strings, written=codec.written[codec.written])
