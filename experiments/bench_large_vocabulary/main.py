"""Times searches of a large table, interleaved, and merging; memory is the compiler's figure."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from decoding import large_vocabulary, projected_search
from decoding.large_vocabulary import Table
from experiments import corpora, report
from experiments.bench_large_vocabulary.config import Config
from experiments.report import Column
from lm.model import layers
from tokenization.transfer import dynamic
from tokenization.vocabularies.boundaries import BoundaryRule
from tokenization.vocabularies.bpe import BPETokenizer

_TRAINING_BYTES = 2_000_000


class _Side(NamedTuple):
    run: Callable[[], Any]
    temporaries: int
    tokens_BA: jax.Array


def main(config: Config, out: epath.Path) -> dict[str, float]:
    """Prints both tables; returns the metrics."""
    del out
    metrics: dict[str, float] = {}
    rows = [*_search(config, jnp.float32, metrics), *_search(config, jnp.bfloat16, metrics)]
    columns = [
        Column('name', 'search'), Column('table', 'table'),
        Column('ms', 'ms', '.1f'), Column('ratio', 'x dense', '.2f'),
        Column('mb', 'temporaries MB', '.1f'), Column('recall', f'recall at {config.k}', '.3f'),
    ]  # fmt: skip
    report.table(
        rows, columns,
        f'top {config.k} of V = {config.vocab_size} logits, D = {config.width}, '
        f'B = {config.batch_size}',
        [f'shortlist: {config.shortlist} tokens by {config.rank} of {config.width} dimensions, '
         'then exact', 'temporaries: the compiler\'s figure, without the table and the result'],
    )  # fmt: skip
    rows = _merging(config, metrics)
    columns = [
        Column('name', 'boundary'), Column('merges', 'merges', 'd'),
        Column('reduction', 'fewer units', '.1%'), Column('share', 'of the maximum', '.1%'),
        Column('speed', 'tokens per second', ',.0f'),
    ]  # fmt: skip
    report.table(
        rows, columns,
        f'merging {config.documents} documents of {config.length} source tokens on one core',
    )  # fmt: skip
    return metrics


def _search(config: Config, dtype: Any, metrics: dict[str, float]) -> list[dict[str, Any]]:
    """Returns the table's rows for one dtype of table and hidden states."""
    name = jnp.dtype(dtype).name
    key = jax.random.key(0)
    h_BD = jax.random.normal(jax.random.fold_in(key, 1), (config.batch_size, config.width), dtype)
    rows_VD = jax.random.normal(key, (config.vocab_size, config.width), dtype)
    tables = {'even': rows_VD}
    if dtype == jnp.float32:
        scale_D = jnp.arange(1, config.width + 1, dtype=dtype) ** -config.decay
        tables['decaying'] = rows_VD * scale_D
    sides: dict[tuple[str, str], _Side] = {}
    for kind, rows in tables.items():
        table = Table(rows, config.vocab_size, chunk=config.chunk)
        if kind == 'even':
            sides['dense', kind] = _side(_dense, config.k, table, h_BD)
            sides['chunks', kind] = _side(_by_chunks, config.k, table, h_BD)
        else:
            sides['chunks', kind] = _side(_by_chunks, config.k, table, h_BD)
        if dtype == jnp.float32:
            projection = jax.jit(projected_search.project, static_argnums=1)(table, config.rank)
            approximate = functools.partial(_shortlist, config.shortlist)
            sides['shortlist', kind] = _side(approximate, config.k, (table, projection), h_BD)
    seconds = _in_turn({side: part.run for side, part in sides.items()}, config.repeats)
    result = []
    for (method, kind), side in sides.items():
        exact_BA = sides['chunks', kind].tokens_BA
        recall = float(projected_search.recall(side.tokens_BA, exact_BA))
        ratio = seconds[method, kind] / seconds['dense', 'even']
        row = {'name': method, 'table': f'{name}, {kind}', 'ms': 1e3 * seconds[method, kind],
               'ratio': ratio, 'mb': side.temporaries / 1e6, 'recall': recall}  # fmt: skip
        result.append(row)
        conditions = {'dtype': name, 'table': kind}
        metrics[report.key('search_ratio', method, **conditions)] = ratio
        metrics[report.key('search_seconds', method, **conditions)] = seconds[method, kind]
        metrics[report.key('temporary_bytes', method, **conditions)] = side.temporaries
        metrics[report.key('recall', method, **conditions)] = recall
    return result


def _dense(k: int, table: Table, h_BD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the top k tokens and the log-normaliser, from dense logits."""
    logits_BV = layers.einsum('bd,vd->bv', h_BD, table.rows_VD, jnp.float32)
    return jax.lax.top_k(logits_BV, k)[1], jax.nn.logsumexp(logits_BV, axis=1)


def _by_chunks(k: int, table: Table, h_BD: jax.Array) -> tuple[jax.Array, jax.Array]:
    found = large_vocabulary.search(table, h_BD, k)
    return found.tokens_BA, found.log_normalizer_B


def _shortlist(shortlist: int, k: int, tables: Any, h_BD: jax.Array) -> tuple[jax.Array, jax.Array]:
    table, projection = tables
    logits_BA, tokens_BA = projected_search.search(table, projection, h_BD, k, shortlist)
    return tokens_BA, logits_BA


def _side(function: Callable[..., Any], k: int, table: Any, h_BD: jax.Array) -> _Side:
    compiled = jax.jit(functools.partial(function, k)).lower(table, h_BD).compile()
    memory: Any = compiled.memory_analysis()
    tokens_BA = compiled(table, h_BD)[0]
    return _Side(lambda: compiled(table, h_BD), memory.temp_size_in_bytes, tokens_BA)


def _in_turn(runs: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """Returns the median seconds of each run, interleaved; the first round only compiles."""
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            if repeat:
                seconds[name].append(time.perf_counter() - begin)
    return {name: float(np.median(times)) for name, times in seconds.items()}


def _merging(config: Config, metrics: dict[str, float]) -> list[dict[str, Any]]:
    corpus = corpora.standard_library()
    training = corpora.first_bytes(corpus.train, _TRAINING_BYTES)
    tokenizer = BPETokenizer.train(training, config.source_vocab)
    size = config.documents * config.length
    text = b''.join(corpora.first_bytes(corpus.test, 8 * size))
    documents = np.split(tokenizer.encode(text)[:size], range(config.length, size, config.length))
    rules: list[Any] = ['pretokens', 'word', 'word_hyphen', 'sentence']
    result = []
    for name in rules:

        def run(merges, name=name):
            # a new rule each time, with an empty cache, as for an unseen batch
            rule = BoundaryRule(name, tokenizer.tokens)
            return dynamic.merge(documents, tokenizer.tokens, merges, rule)

        seconds = _in_turn({name: functools.partial(run, config.merges)}, config.repeats)[name]
        lengths, most = run(config.merges).lengths, run(None).lengths
        saved = int(lengths[0] - lengths[-1])
        speed = float(lengths[0]) / seconds
        result.append(
            {'name': name, 'merges': len(lengths) - 1, 'reduction': saved / int(lengths[0]),
             'share': saved / max(int(most[0] - most[-1]), 1), 'speed': speed}
        )  # fmt: skip
        metrics[report.key('merged_tokens_per_second', name)] = speed
        metrics[report.key('reduction', name)] = result[-1]['reduction']
    return result
