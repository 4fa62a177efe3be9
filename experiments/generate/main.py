"""Streams one continuation and reports its speed."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from decoding import calibrate, sample, stop
from decoding.drafter import Drafter
from decoding.drafts import template
from decoding.generate import generate, plain
from decoding.model import for_decoding
from decoding.sample import Sampler
from experiments import decoding_models, report
from experiments.decoding_models import Loaded
from experiments.generate.config import Config
from experiments.generate.stream import Painter
from experiments.speculative import drafters
from experiments.speculative.drafters import Parts
from lm.attention import ring

_CALIBRATED_ROWS = 256  # cache rows while passes are timed
_RANKS = 8  # ranks of candidates with an assumed acceptance rate


def main(config: Config, out: epath.Path, mesh: Mesh) -> dict[str, float]:
    """Streams the prompt and its continuation, then prints the speed; returns the metrics."""
    sampler = Sampler(jnp.float32(config.temperature), config.top_k, config.top_p)
    sample.check(sampler)
    if not config.prompt:
        raise ValueError('--prompt: empty; give some text to continue')
    with jax.set_mesh(mesh):
        ring.refuse('decoding')  # before anything is loaded
    loaded = decoding_models.load(config.bundle, mesh)
    drafter = make_drafter(config, loaded, sampler, out, mesh)
    prompt = loaded.encode(config.prompt.encode())
    written = loaded.token_bytes()
    stops = None
    if config.stop or loaded.ends():
        rule = stop.Rule(loaded.ends(), tuple(s.encode() for s in config.stop))
        stops = stop.build([rule], written)
    console = Console(highlight=False)
    painter = Painter(console, written)
    clock = _Clock()

    def stream(row: int, tokens: np.ndarray) -> None:
        del row
        if not clock.times:  # the prompt is printed only now, once the arguments have been checked
            painter.plain(config.prompt)
        clock.tick(len(tokens))
        painter.round(tokens)

    with jax.set_mesh(mesh):
        metrics = generate(
            loaded.model, [prompt], key=jax.random.key(config.seed),
            max_new_tokens=config.max_tokens, sampler=sampler, drafter=drafter, stops=stops,
            stream=stream,
        ).metrics  # fmt: skip
    painter.end()
    console.print(f'\n{describe(metrics.tokens, metrics.rounds, clock.tokens_per_s)}')
    result = {
        report.key('tokens', 'text'): metrics.tokens,
        report.key('block_efficiency', 'text'): metrics.block_efficiency,
        report.key('memory_bound_speedup', 'text'): metrics.memory_bound_speedup,
    }
    if clock.tokens_per_s is not None:
        result[report.key('tokens_per_s', 'text')] = clock.tokens_per_s
    return result


def make_drafter(
    config: Config, loaded: Loaded, sampler: Sampler, out: epath.Path, mesh: Mesh
) -> Drafter:
    """Returns the drafter that the config selects; the measured cost curve is cached in `out`.

    Raises:
      ValueError: the draft model is missing, or the drafter does not support these sizes.
      FileNotFoundError: there is no bundle at `--draft`.
    """
    if config.drafter == 'none':
        return plain()
    draft = None
    if config.draft is not None:
        draft = for_decoding(decoding_models.load(config.draft, mesh).model)
    parts = Parts(loaded.model, draft, config.exit_layers, None, config.longest)
    nodes = _best_nodes(loaded, out) if config.nodes == 'auto' else config.nodes
    drafter = drafters.of_budget(config.drafter, parts, nodes)
    own = decoding_models.draft_sampler(sampler, drafter, config.draft_temperature)
    return drafters.with_sampler(drafter, own)


def _best_nodes(loaded: Loaded, out: epath.Path) -> int:
    """Returns the best number of draft nodes on this machine, at assumed acceptance rates."""
    lm, rows = for_decoding(loaded.model), min(loaded.config.max_length, _CALIBRATED_ROWS)
    about = {
        'cpu': report.environment()['cpu'], **report.devices(), 'rows': rows,
        'jax': jax.__version__, 'model': repr(loaded.config),
    }  # fmt: skip
    find = functools.partial(calibrate.measure, lm, 1, rows)
    curve = calibrate.remembered(out / 'curve.json', about, find)
    best = calibrate.best_nodes(curve, template.acceptance_of(_RANKS).tolist())
    return max(len(best.template.parent) - 1, 1)


def describe(tokens: int, rounds: int, tokens_per_s: float | None) -> str:
    """Returns the line printed after a text."""
    speed = '' if tokens_per_s is None else f'{tokens_per_s:.0f} tokens/s, '
    efficiency = f'{tokens / rounds:.2f}'
    return f'{speed}block efficiency {efficiency}: {tokens} tokens in {rounds} passes of the model'


class _Clock:
    """Times rounds, except the first, which includes compilation."""

    def __init__(self):
        self.times: list[float] = []
        self._tokens = 0

    def tick(self, tokens: int) -> None:
        self._tokens += tokens if self.times else 0
        self.times.append(time.perf_counter())

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second after the first round; None if there was only one round."""
        if len(self.times) < 2:
            return None
        return self._tokens / (self.times[-1] - self.times[0])
