"""Times plain decoding, passes over trees, and the phases of a round, interleaved in one run."""

import functools
import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from decoding import calibrate
from decoding import model as model_lib
from decoding.drafts import template
from decoding.generate import generate
from decoding.model import LM
from decoding.sample import Sampler
from experiments import report
from experiments.bench_decode import phases
from experiments.bench_decode.config import Config
from experiments.report import Column
from lm.model import params as params_lib
from lm.model.config import Config as ModelConfig

GREEDY = Sampler(temperature=jnp.float32(0))
BY_US, BY_HUGGING_FACE = 'ours', 'Hugging Face'
SETTLE = 0.5  # seconds after which PyTorch's idle threads stop spinning


def main(config: Config, out: epath.Path) -> dict[str, float]:
    """Prints the tables; returns the metrics."""
    del out
    params = jax.jit(functools.partial(params_lib.init, config.model))(jax.random.key(0))
    model = model_lib.for_decoding(model_lib.transformer(config.model, params))
    metrics = {**plain(config, model, params), **costs(config, model)}
    del params
    return {**metrics, **one_round(config, model)}


def plain(config: Config, model: LM, params: Any) -> dict[str, float]:
    """Compares plain greedy decoding with the streaming limit and with Hugging Face."""
    passes: list[tuple[str, int, Callable[[], float]]] = []  # name, batch, -> seconds of a round
    for batch in config.batches:
        passes.append((BY_US, batch, _ours(config, model, batch)))
        if importlib.util.find_spec('transformers') and importlib.util.find_spec('torch'):
            passes.append((BY_HUGGING_FACE, batch, _hugging_face(config, params, batch)))
    read = weight_bytes(config.model)
    seconds = medians(
        {'limit': streaming(config, read), **{(n, b): run for n, b, run in passes}}, config.repeats
    )
    limit = seconds['limit']
    gbps = read / limit / 1e9
    rows, metrics = [], {report.key('gb_per_s', 'limit'): gbps}
    for name, batch, _ in passes:
        mine, other = seconds[name, batch], seconds.get((BY_HUGGING_FACE, batch))
        rows.append({
            'name': name, 'batch': batch, 'ms': mine * 1e3, 'rate': batch / mine,
            'share': limit / mine, 'ratio': other and other / mine,
        })  # fmt: skip
        row = name.replace(' ', '_').lower()
        metrics[report.key('tokens_per_s', row, batch=batch)] = batch / mine
        metrics[report.key('share_of_limit', row, batch=batch)] = limit / mine
        if other and name == BY_US:
            metrics[report.key('speedup', 'over_hugging_face', batch=batch)] = other / mine
    columns = [
        Column('name', ''), Column('batch', 'rows', '.0f'), Column('ms', 'ms per pass', '.1f'),
        Column('rate', 'tokens/s', '.1f'), Column('share', 'fraction of streaming limit', '.2f'),
        Column('ratio', 'x Hugging Face', '.2f'),
    ]  # fmt: skip
    report.table(
        rows, columns,
        f'plain greedy decoding, {params_lib.count(config.model) / 1e6:.0f}M parameters, '
        f'{config.model.dtype}, {config.prompt_tokens} + {config.new_tokens} tokens; medians of '
        f'{config.repeats} interleaved runs',
        [f'streaming limit: {read / 1e6:.0f} MB of weights at {gbps:.1f} GB/s (bandwidth of '
         f'{config.matrix} x {config.matrix} matrix-vector products): {limit * 1e3:.1f} ms'],
    )  # fmt: skip
    return metrics


def weight_bytes(model: ModelConfig) -> int:
    """Returns the bytes of weights that a pass reads: all except the input embedding table."""
    unread = 0 if model.tied else model.vocab_size * model.d_model
    return (params_lib.count(model) - unread) * jnp.dtype(model.dtype).itemsize


def streaming(config: Config, read: int) -> Callable[[], float]:
    """Returns a function that times reading at least `read` bytes, scaled to exactly `read`."""
    dtype = jnp.dtype(config.model.dtype)
    w = jnp.full((config.matrix, config.matrix), 1 / config.matrix, dtype)
    times = -(-read // w.nbytes)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    @jax.jit
    def products(w, x):
        for _ in range(times):
            x = jnp.matmul(w, x, precision=precision)
        return x

    x = jnp.ones(config.matrix, dtype)
    return lambda: elapsed(lambda: products(w, x)) * read / (times * w.nbytes)


def elapsed(run: Callable[[], Any]) -> float:
    """Returns the wall-clock seconds of a run, including device work."""
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin


def medians(runs: Mapping[Any, Callable[[], float]], repeats: int) -> dict[Any, float]:
    """Returns each run's median result; runs are interleaved, after one run that compiles."""
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            found = run()
            if repeat:
                seconds[name].append(found)
    return {name: float(np.median(times)) for name, times in seconds.items()}


def _prompts(config: Config, batch: int) -> np.ndarray:
    shape = (batch, config.prompt_tokens)
    return np.random.default_rng(0).integers(0, config.model.vocab_size, shape)


def _ours(config: Config, model: LM, batch: int) -> Callable[[], float]:
    def run() -> float:
        result = generate(
            model, list(_prompts(config, batch)), key=jax.random.key(0), sampler=GREEDY,
            max_new_tokens=config.new_tokens,
        )  # fmt: skip
        return result.metrics.decode_seconds / config.new_tokens

    return run


def _hugging_face(config: Config, params: Any, batch: int) -> Callable[[], float]:
    from experiments.bench_decode import hugging_face

    device = 'cpu' if jax.default_backend() == 'cpu' else 'cuda'
    run = hugging_face.generator(params, config.model, device)
    prompts = _prompts(config, batch)

    def per_pass() -> float:
        # prefill produces the first token, which is not decoding
        first = elapsed(lambda: run(prompts, 1))
        all_of_them = elapsed(lambda: run(prompts, config.new_tokens))
        time.sleep(SETTLE)
        return (all_of_them - first) / (config.new_tokens - 1)

    return per_pass


def costs(config: Config, model: LM) -> dict[str, float]:
    """Measures the cost of a pass over several nodes, and picks the best tree size."""
    rows = config.prompt_tokens + config.new_tokens
    curve = calibrate.measure(model, 1, rows, config.nodes, config.repeats)
    one = curve.at(1)
    rates = template.acceptance_of(8).tolist()
    best = calibrate.best_nodes(curve, rates)
    report.table(
        [{'nodes': n, 'ms': s * 1e3, 'ratio': s / one} for n, s in zip(*curve)],
        [Column('nodes', 'nodes', '.0f'), Column('ms', 'ms per pass', '.1f'),
         Column('ratio', 'x one node', '.2f')],
        f'a pass of the target over the nodes of one tree, {rows} rows cached',
        [f'at acceptance rates {", ".join(f"{x:.2f}" for x in rates[:4])}, ... by rank, '
         f'{len(best.template.parent)} nodes are best: {best.tokens:.2f} tokens per round, '
         f'{best.speedup:.2f} times plain decoding if drafting were free'],
    )  # fmt: skip
    return {
        **{report.key('ms', 'pass', nodes=n): s * 1e3 for n, s in zip(*curve)},
        report.key('cost_ratio', 'pass', nodes=8): curve.at(8) / one,
        report.key('best_nodes', 'pass'): len(best.template.parent),
    }


def one_round(config: Config, model: LM) -> dict[str, float]:
    """Times the phases of a round with a draft model, each jitted separately."""
    seconds = phases.measure(config, model)
    whole = seconds['round']
    rows = [{'name': n, 'ms': s * 1e3, 'share': s / whole} for n, s in seconds.items()]
    report.table(
        rows,
        [
            Column('name', 'phase'),
            Column('ms', 'ms', '.2f'),
            Column('share', 'fraction of a round', '.3f'),
        ],
        f'a round: trees of {"x".join(map(str, config.factors))} from a draft model of '
        f'{params_lib.count(config.draft) / 1e6:.0f}M, one row',
    )
    return {report.key('ms', name.replace(' ', '_')): s * 1e3 for name, s in seconds.items()} | {
        report.key('share_of_round', name.replace(' ', '_')): s / whole
        for name, s in seconds.items()
    }
