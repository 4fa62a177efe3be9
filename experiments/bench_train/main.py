"""Times a training step against the matmul peak, and measures the loss's memory."""

import functools
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments import language_model, report
from experiments.bench_train.config import Config
from experiments.report import Column
from lm.devices import mesh as mesh_lib
from lm.losses import cross_entropy
from lm.model import params
from lm.model.config import Config as ModelConfig
from lm.training import optimizer, train

_VOCABULARY = 256


def main(config: Config, out: epath.Path) -> dict[str, float]:
    """Prints both tables; returns the metrics."""
    del out
    return {**speed(config), **loss_memory(config)}


def model_config(config: Config) -> ModelConfig:
    """Returns the timed model: heads of 64 channels, gated MLP of 4 d, unrolled layers."""
    heads = max(config.width // 64, 1)
    return ModelConfig(
        _VOCABULARY, config.width, config.layers, heads, heads, config.width // heads,
        4 * config.width, max_length=config.length, unroll=config.layers,
    )  # fmt: skip


def speed(config: Config) -> dict[str, float]:
    """Times a matmul, our step and PyTorch's, interleaved, and prints their FLOP/s."""
    model = language_model.with_vocabulary(model_config(config), _VOCABULARY)
    flops = 3 * params.flops_per_token(model, config.length) * config.batch_size * config.length
    sides: dict[str, tuple[Callable[[], None], float]] = {
        'matmul peak': (_matmul(config.peak_size), 2 * config.peak_size**3),
        'training step': (_step(model, config), flops),
    }
    if importlib.util.find_spec('torch') and jax.default_backend() == 'cpu':
        from experiments.bench_train import pytorch

        sides['training step, PyTorch'] = (pytorch.step(model, config), flops)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run, _ in sides.values():
        run()  # compiles
    for _ in range(config.repeats):
        for name, (run, _) in sides.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    rates = {name: cost / np.median(seconds[name]) / 1e9 for name, (_, cost) in sides.items()}
    peak = rates['matmul peak']
    report.table(
        [{'name': n, 'rate': rate, 'share': rate / peak} for n, rate in rates.items()],
        [
            Column('name', ''),
            Column('rate', 'GFLOP/s', '.0f'),
            Column('share', 'fraction of peak', '.2f'),
        ],
        f'f32, d = {config.width}, {config.layers} layers, batch {config.batch_size} x '
        f'{config.length}, medians of {config.repeats} interleaved runs',
    )
    names = {'matmul peak': 'matmul', 'training step': 'step', 'training step, PyTorch': 'torch'}
    return {
        **{report.key('gflop_per_s', names[name]): rate for name, rate in rates.items()},
        report.key('share_of_peak', 'step'): rates['training step'] / peak,
    }


def _matmul(size: int) -> Callable[[], None]:
    x = jnp.full((size, size), 0.5)
    product = jax.jit(lambda x: jnp.matmul(x, x, precision='highest'))
    return lambda: jax.block_until_ready(product(x))


def _step(model: ModelConfig, config: Config) -> Callable[[], None]:
    mesh = mesh_lib.make(devices=jax.devices()[:1])
    adamw = optimizer.make(optimizer.OptimizerConfig(), 1000, params.leaves(model))
    init = jax.jit(
        functools.partial(params.init, model), out_shardings=params.shardings(model, mesh)
    )
    state: Any = train.init_state(init(jax.random.key(0)), adamw, mesh)
    shape = (config.batch_size, config.length)
    batch = {
        'tokens': jax.random.randint(jax.random.key(1), shape, 0, _VOCABULARY),
        'targets': jax.random.randint(jax.random.key(2), shape, 0, _VOCABULARY),
        'segments': jnp.ones(shape, jnp.int32),
        'positions': jnp.broadcast_to(jnp.arange(config.length), shape),
        'weights': jnp.ones(shape),
    }
    loss = language_model.loss_fn(model, 1e-4)
    step = jax.jit(functools.partial(train.train_step, loss, adamw, 0), donate_argnums=0)

    def run():
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    return run


def loss_memory(config: Config) -> dict[str, float]:
    """Compiles the loss and its gradients at two vocabulary sizes and prints their memory."""
    tokens = config.batch_size * config.length
    rows, peaks = [], []
    for vocab_size in (config.small_vocab, config.large_vocab):
        analysis = _loss_analysis(tokens, config.width, vocab_size)
        table = vocab_size * config.width * 4
        peak = (
            analysis.temp_size_in_bytes + analysis.argument_size_in_bytes
            + analysis.output_size_in_bytes
        )  # fmt: skip
        peaks.append((peak, table))
        rows.append({'v': vocab_size, 'peak': peak / 1e6, 'table': table / 1e6,
                     'temp': analysis.temp_size_in_bytes / 1e6,
                     'logits': tokens * vocab_size * 4 / 1e6})  # fmt: skip
    columns = [
        Column('v', 'V', '.0f'),
        Column('peak', 'peak MB', '.1f'),
        Column('table', 'table MB', '.1f'),
        Column('temp', 'temporaries MB', '.1f'),
        Column('logits', 'MB of all logits', '.1f'),
    ]
    report.table(rows, columns, f'loss and gradients of {tokens} tokens, d = {config.width}')
    (small, small_table), (large, large_table) = peaks
    # subtract the table and its gradient, which any loss needs
    ratio = (large - 2 * large_table) / (small - 2 * small_table)
    return {
        report.key('peak_mb', 'loss', vocab_size=config.small_vocab): small / 1e6,
        report.key('peak_mb', 'loss', vocab_size=config.large_vocab): large / 1e6,
        report.key('ratio_without_tables', 'loss'): ratio,
    }


def _loss_analysis(tokens: int, width: int, vocab_size: int) -> Any:
    h = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
    table = jax.ShapeDtypeStruct((vocab_size, width), jnp.float32)
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)

    def mean(h, table, targets):
        return cross_entropy.chunked_cross_entropy(h, table, targets).nats.mean()

    step = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))
    return step.lower(h, table, targets).compile().memory_analysis()
