"""Times each kernel and its alternatives, interleaved, and relates them to two measured peaks."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments import report
from experiments.bench_attention import sides as sides_lib
from experiments.bench_attention.config import Config
from experiments.report import Column

COLUMNS = [
    Column('task', ''),
    Column('length', 'keys', '.0f'),
    Column('name', ''),
    Column('ms', 'ms', '.3f'),
    Column('tflops', 'TFLOP/s', '.3f'),
    Column('flop_share', 'of matmul peak', '.2f'),
    Column('gbps', 'GB/s', '.1f'),
    Column('byte_share', 'of copy peak', '.2f'),
    Column('ratio', 'x ours', '.2f'),
]


def main(config: Config, out: epath.Path) -> dict[str, float]:
    """Prints the table; returns the metrics."""
    del out
    matmul, copy = peaks(config)
    print(f'measured peaks: {matmul / 1e12:.3f} TFLOP/s, {copy / 1e9:.1f} GB/s (reads + writes)')
    rows: list[dict[str, Any]] = []
    for length in config.lengths:
        found = sides_lib.sides(config, length)
        for task in dict.fromkeys(side.task for side in found):
            group = [side for side in found if side.task == task]
            seconds = _medians([functools.partial(s.run, *s.operands) for s in group], config)
            rows += [
                _row(config, side.task, side.name, length, t, seconds[0], matmul, copy)
                for side, t in zip(group, seconds, strict=True)
            ]
    report.table(
        rows, COLUMNS,
        f'{config.dtype}, B {config.batch_size}, H {config.heads}, K {config.kv_heads}, '
        f'C {config.channels}, tree of {config.nodes}; medians of {config.repeats}, interleaved',
    )  # fmt: skip
    metrics = {report.key('matmul_tflop_per_s', 'peak'): matmul / 1e12,
               report.key('copy_gb_per_s', 'peak'): copy / 1e9}  # fmt: skip
    for row in rows:
        name = row['name'].replace(' ', '_')
        for field in ('ms', 'tflops', 'gbps', 'ratio'):
            metrics[report.key(field, name, task=row['task'], length=row['length'])] = row[field]
    ms = {(row['task'], row['length']): row['ms'] for row in rows if row['name'] == 'ours'}
    for length in config.lengths:
        ratio = ms['tree', length] / ms['decode', length]
        print(f'{length} keys: a tree of {config.nodes} nodes takes {ratio:.2f} times one query')
        metrics[report.key('tree_over_decode', 'ours', length=length)] = ratio
    return metrics


def _row(config, task, name, length, seconds, ours, matmul, copy) -> dict[str, Any]:
    flops, read = work(config, task, length)
    return {
        'task': task, 'length': length, 'name': name, 'ms': seconds * 1e3,
        'tflops': flops / seconds / 1e12, 'flop_share': flops / seconds / matmul,
        'gbps': read / seconds / 1e9, 'byte_share': read / seconds / copy,
        'ratio': seconds / ours,
    }  # fmt: skip


def work(config: Config, task: str, length: int) -> tuple[float, float]:
    """Returns the minimal FLOPs and bytes of a task, counted analytically.

    FLOPs: two products per visible pair of query and key; the backward pass takes 2.5 times the
    forward pass (five products, one of which recomputes the logits). Bytes: keys and values (kept
    blocks only; for column sums, keys only), queries and results, once each.
    """
    b, h, n_kv, c = config.batch_size, config.heads, config.kv_heads, config.channels
    size = jnp.dtype(config.dtype).itemsize
    keys = 2 * b * n_kv * length * c * size
    queries = {'forward': length, 'training': length, 'decode': 1, 'sparse_decode': 1}
    n = queries.get(task, config.nodes)
    pairs = n * length / 2 if task in ('forward', 'training') else n * length
    flops = 4.0 * b * h * c * pairs
    if task == 'sparse_decode':
        every = max(round(1 / config.kept), 1)
        return flops / every, keys / every
    if task == 'column_sums':
        return flops / 2, keys / 2
    rows = 2 * b * h * n * c * size
    return (flops * 3.5, 3 * (keys + rows)) if task == 'training' else (flops, keys + rows)


def peaks(config: Config) -> tuple[float, float]:
    """Returns the FLOP/s of a square matmul and the bytes/s of a copy (reads plus writes)."""
    n = config.peak_size
    dtype = jnp.dtype(config.dtype)
    x = jnp.ones((n, n), dtype)
    long = jnp.ones((16 * n, n), dtype)
    product = jax.jit(lambda x: jnp.matmul(x, x, precision='highest' if n and dtype == jnp.float32
                                           else None))  # fmt: skip
    add = jax.jit(lambda x: x + 1)
    matmul, copy = _medians([lambda: product(x), lambda: add(long)], config)
    return 2 * n**3 / matmul, 2 * long.nbytes / copy


def _medians(runs: Sequence[Callable[[], Any]], config: Config) -> list[float]:
    """Returns the median seconds of each; runs are interleaved, after one run that compiles."""
    for run in runs:
        jax.block_until_ready(run())
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(config.repeats):
        for run, into in zip(runs, seconds, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(run())
            into.append(time.perf_counter() - begin)
    return [float(np.median(times)) for times in seconds]
