"""Encodes and decodes one text with each tokenizer, interleaved, and compares throughput."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from experiments import corpora, report
from experiments.bench_codec.config import Config
from tokenization.coding import ngram
from tokenization.equal_info import compiler
from tokenization.tokenizer import Tokenizer
from tokenization.vocabularies import bpe


def main(config: Config, out: epath.Path) -> dict[str, float]:
    """Prints the table and returns the flat metrics; writes no files of its own into `out`."""
    del out
    corpus = corpora.standard_library()
    train = corpora.first_bytes(corpus.train, config.train_bytes)
    # The last character may be cut, and some files are not UTF-8; BPE has a special case for both.
    text = b''.join(corpora.first_bytes(corpus.test, config.text_bytes))[: config.text_bytes]
    text = text.decode('utf-8', 'ignore').encode()

    built, seconds = {}, {}
    start = time.perf_counter()
    model = ngram.count(train, config.order).model()
    seconds['ngram'] = time.perf_counter() - start
    makers: dict[str, Callable[[], Tokenizer]] = {
        'canonical': lambda: compiler.compile_equal_info(model, 'canonical', config.max_bytes),
        'delay': lambda: compiler.compile_equal_info(model, 'delay', config.max_bytes),
        'tunstall': lambda: compiler.tunstall(model, max_bytes=config.max_bytes),
    }
    for name, make in makers.items():
        start = time.perf_counter()
        built[name] = make()
        seconds[name] = time.perf_counter() - start
    start = time.perf_counter()
    pieces = corpora.first_bytes(corpus.train, config.bpe_train_bytes)
    built['bpe'] = bpe.BPETokenizer.train(pieces, compiler.CELLS)
    seconds['bpe'] = time.perf_counter() - start

    rows = measure(built, text, config.repeats)
    for row in rows:
        row['seconds'] = seconds[row['name']]
        row['ratio'] = row['encode'] / rows[-1]['encode']
    columns = [
        report.Column('name', 'tokenizer'),
        report.Column('vocab_size', 'entries', ',d'),
        report.Column('bytes_per_token', 'bytes per token', '.3f'),
        report.Column('seconds', 'build s', '.1f'),
        report.Column('encode', 'encode MB/s', '.1f'),
        report.Column('decode', 'decode MB/s', '.1f'),
        report.Column('ratio', 'encode / tiktoken', '.2f'),
    ]
    notes = [
        f'{len(text):,} bytes of held-out {corpus.name}; medians of {config.repeats}, one thread',
        f'order-{config.order} n-gram counted and quantised in {seconds["ngram"]:.1f} s',
        'bpe: trained by tokenizers, encoded by tiktoken (encode_ordinary to an array of ids)',
    ]
    report.table(rows, columns, 'Compiled codec', notes)
    names = {
        'vocab_size': 'vocab_size',
        'bytes_per_token': 'bytes_per_token',
        'seconds': 'seconds_to_make',
        'encode': 'encode_mb_per_s',
        'decode': 'decode_mb_per_s',
        'ratio': 'encode_over_tiktoken',
    }
    return {
        report.key(metric, row['name']): row[field]
        for row in rows
        for field, metric in names.items()
    }


def measure(tokenizers: dict[str, Tokenizer], text: bytes, repeats: int) -> list[dict[str, Any]]:
    """Returns one row per tokenizer; runs are interleaved, so that other load affects all alike."""
    ids = {name: each.encode(text) for name, each in tokenizers.items()}  # warm-up
    for name, each in tokenizers.items():
        if each.decode(ids[name]) != text:
            raise RuntimeError(f'{name}: the decoded text differs from the original')
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(repeats):
        for name, each in tokenizers.items():
            for what, run in (
                ('encode', functools.partial(each.encode, text)),
                ('decode', functools.partial(each.decode, ids[name])),
            ):
                start = time.perf_counter()
                run()
                times.setdefault((name, what), []).append(time.perf_counter() - start)
    return [
        {
            'name': name,
            'vocab_size': each.vocab_size,
            'bytes_per_token': len(text) / len(ids[name]),
            'encode': len(text) / 1e6 / statistics.median(times[name, 'encode']),
            'decode': len(text) / 1e6 / statistics.median(times[name, 'decode']),
        }
        for name, each in tokenizers.items()
    ]
