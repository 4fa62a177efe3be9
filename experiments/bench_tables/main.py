"""Times a training step with each kind of table, interleaved; memory is the compiler's figure."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments import language_model, report
from experiments.bench_tables.config import Config
from experiments.report import Column
from lm.model import params
from lm.model.config import Config as ModelConfig
from lm.model.config import Lexinvariant
from lm.training import optimizer, train


class _Side(NamedTuple):
    run: Callable[[], None]
    bytes: int


def main(config: Config, out: epath.Path) -> dict[str, float]:
    """Prints the table; returns the metrics."""
    del out
    kinds = {
        'learned': None,
        'permuted': Lexinvariant('permuted'),
        'gaussian': Lexinvariant('gaussian'),
        f'gaussian, p = {config.probability:g}': Lexinvariant('gaussian', config.probability),
    }
    sides = {name: _side(config, kind) for name, kind in kinds.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(config.repeats + 1):
        for name, side in sides.items():
            begin = time.perf_counter()
            side.run()
            if repeat:
                seconds[name].append(time.perf_counter() - begin)
    median = {name: float(np.median(times)) for name, times in seconds.items()}
    learned = sides['learned'].bytes
    rows: list[dict[str, Any]] = [
        {'name': name, 'seconds': median[name], 'ratio': median[name] / median['learned'],
         'mb': side.bytes / 1e6, 'share': side.bytes / learned}
        for name, side in sides.items()
    ]  # fmt: skip
    columns = [
        Column('name', 'table'), Column('seconds', 'seconds per step', '.2f'),
        Column('ratio', 'x learned', '.2f'), Column('mb', 'peak MB', '.0f'),
        Column('share', 'x learned ', '.2f'),
    ]  # fmt: skip
    report.table(
        rows, columns,
        f'training step at V = {config.vocab_size}, {config.batch_size} x {config.length} tokens, '
        f'd = {config.width}, {config.layers} layers, documents per row: {config.segments}',
        ['peak: arguments, results and temporaries of the compiled step, including the optimizer'],
    )  # fmt: skip
    metrics: dict[str, float] = {}
    for row in rows:
        name = 'partial' if ',' in row['name'] else row['name']
        metrics[report.key('step_ratio', name)] = row['ratio']
        metrics[report.key('memory_ratio', name)] = row['share']
        metrics[report.key('seconds', name)] = row['seconds']
    return metrics


def _side(config: Config, kind: Lexinvariant | None) -> _Side:
    heads = config.width // 64
    model = ModelConfig(
        config.vocab_size, config.width, config.layers, heads, heads, 64, 4 * config.width,
        max_length=config.length, activation='relu', tied=True, scale_embeddings=True,
        lexinvariant=kind,
    )  # fmt: skip
    settings = optimizer.OptimizerConfig()
    steps = optimizer.make(settings, 100, params.leaves(model))
    loss = language_model.loss_fn(model, 1e-4)
    batch = _batch(config)

    def step(state: train.TrainState) -> train.TrainState:
        return train.train_step(loss, steps, 0, state, batch)[0]

    weights = params.init(model, jax.random.key(0))
    state = train.TrainState(jnp.zeros((), jnp.int32), weights, steps.init(weights))
    compiled = jax.jit(step, donate_argnums=0).lower(state).compile()
    memory: Any = compiled.memory_analysis()
    held = [state]

    def run() -> None:
        held[0] = jax.block_until_ready(compiled(held[0]))

    # the donated state is counted only once
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    return _Side(run, peak + memory.output_size_in_bytes - memory.alias_size_in_bytes)


def _batch(config: Config) -> dict[str, jax.Array]:
    shape = config.batch_size, config.length
    random = np.random.default_rng(0)
    columns = np.arange(config.length)
    segments = np.broadcast_to(columns * config.segments // config.length + 1, shape)
    starts = np.flatnonzero(np.diff(segments[0], prepend=0))
    positions = columns - starts[segments[0] - 1]
    return {
        'tokens': jnp.asarray(random.integers(0, config.vocab_size, shape), jnp.int32),
        'targets': jnp.asarray(random.integers(0, config.vocab_size, shape), jnp.int32),
        'segments': jnp.asarray(segments, jnp.int32),
        'positions': jnp.asarray(np.broadcast_to(positions, shape), jnp.int32),
        'weights': jnp.ones(shape, jnp.float32),
    }
