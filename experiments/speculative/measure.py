"""Measures pairs of plain and drafted runs, and aggregates them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from decoding.drafter import Drafter
from decoding.generate import Metrics, generate, plain
from decoding.model import LM
from decoding.sample import Sampler
from experiments import decoding_models
from experiments.speculative import drafters
from experiments.speculative.config import Config

Prompts = Mapping[str, list[list[int]]]


class Cell(NamedTuple):
    """One configuration of the grid, at all temperatures; each is one compiled program.

    Attributes:
      drafter: name of the drafter.
      kind: `budget` (nodes below the root) or `length` (depth of a path).
      size: the budget or length.
      ratio: parameters of the target over those of the draft model.
      batch: batch size.
    """

    drafter: str
    kind: str
    size: int
    ratio: int
    batch: int

    @property
    def name(self) -> str:
        """Name of the cell's file."""
        return f'{self.drafter}_{self.kind}{self.size}_draft{self.ratio}_batch{self.batch}'


class Run(NamedTuple):
    """Several consecutive calls of `generate`."""

    calls: list[Metrics]

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all rows per second of wall-clock time, including prefill."""
        seconds = sum(call.prefill_seconds + call.decode_seconds for call in self.calls)
        return sum(call.tokens for call in self.calls) / seconds


def cells(config: Config, ratios: Sequence[int], main: int) -> list[Cell]:
    """Returns the grid, followed by the sweep over the other draft models at one budget."""
    sizes = [('budget', n) for n in config.budgets] + [('length', n) for n in config.lengths]
    grid = [
        Cell(name, kind, size, main, batch)
        for batch in config.batches
        for kind, size in sizes
        for name in config.drafters
    ]
    sweep = [
        Cell(name, 'budget', config.sweep_budget, ratio, config.batches[0])
        for ratio in ratios
        for name in config.sweep
        if ratio != main
    ]
    return grid + sweep


def measure(
    config: Config, cell: Cell, target: LM, drafter: Drafter, prompts: Prompts
) -> list[dict[str, Any]]:
    """Returns the rows of one cell: one per temperature, and per task if there are several.

    Each repeat has its own random keys and continues every prompt both plainly and with the
    drafter, interleaved.
    """
    rows = []
    for temperature in config.temperatures:
        sampler = Sampler(temperature=jnp.float32(temperature))
        own = decoding_models.draft_sampler(sampler, drafter, config.greedy_draft_temperature)
        sides = (plain(), drafters.with_sampler(drafter, own))
        pairs: dict[str, list[tuple[Run, Run]]] = {task: [] for task in prompts}
        for repeat in range(config.repeats):
            key = jax.random.fold_in(jax.random.key(config.seed), repeat)
            for task, texts in prompts.items():
                keys = jax.random.split(key, len(texts))
                runs = [run(target, side, texts, keys, cell.batch, config.new_tokens, sampler)
                        for side in sides]  # fmt: skip
                pairs[task].append((runs[0], runs[1]))
        common = {**cell._asdict(), 'temperature': temperature}
        rows.append({**common, **summary(list(pairs.values()))})
        if len(pairs) > 1:
            rows += [{**common, 'task': task, **summary([pairs[task]])} for task in pairs]
    return rows


def run(
    target: LM, drafter: Drafter, texts: list[list[int]], keys: jax.Array, batch: int,
    new_tokens: int, sampler: Sampler,
) -> Run:  # fmt: skip
    """Continues texts, `batch` at a time; a call that compiled is repeated."""
    calls = []
    for start in range(0, len(texts), batch):
        rows = slice(start, start + batch)

        def call(rows=rows) -> Metrics:
            return generate(
                target, texts[rows], key=keys[rows], max_new_tokens=new_tokens, sampler=sampler,
                drafter=drafter,
            ).metrics  # fmt: skip

        metrics = call()
        calls.append(call() if metrics.compilations else metrics)
    return Run(calls)


def summary(tasks: Sequence[Sequence[tuple[Run, Run]]]) -> dict[str, Any]:
    """Aggregates pairs of plain and drafted runs, `[task][repeat]`, into metrics.

    Block efficiency and acceptance are pooled over all calls; speeds are medians over repeats.
    """
    repeats = [
        tuple(Run([call for pair in pairs for call in pair[side].calls]) for side in (0, 1))
        for pairs in zip(*tasks, strict=True)
    ]
    calls = [call for _, drafted in repeats for call in drafted.calls]
    tokens, rounds = (np.array([getattr(call, n) for call in calls]) for n in ('tokens', 'rounds'))
    efficiency = tokens.sum() / rounds.sum()
    # standard error of a ratio of sums, over prompts: repeats of a prompt may give the same text
    residuals = (tokens - efficiency * rounds).reshape(len(repeats), -1).sum(axis=0)
    # a single residual is always 0
    error = np.sqrt(np.sum(residuals**2)) / rounds.sum() if len(residuals) > 1 else None
    cost = calls[0].block_efficiency / calls[0].memory_bound_speedup
    rates, offered = acceptance(calls)
    return {
        'block_efficiency': float(efficiency),
        'block_efficiency_error': None if error is None else float(error),
        'memory_bound_speedup': float(efficiency / cost),
        'tokens_per_s': float(np.median([drafted.tokens_per_s for _, drafted in repeats])),
        'plain_tokens_per_s': float(np.median([side.tokens_per_s for side, _ in repeats])),
        'speedup': float(
            np.median([drafted.tokens_per_s / side.tokens_per_s for side, drafted in repeats])
        ),
        'acceptance': float((rates * offered).sum() / offered.sum()),
        'acceptance_by_depth': rates.tolist(),
        'walks_by_depth': offered.tolist(),
    }


def acceptance(calls: Sequence[Metrics]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the acceptance rate at each depth over all calls, and about how many walks count.

    Each call's rate is weighted by the number of its walks that reached the previous depth.
    """
    rates = np.array([call.acceptance_by_depth for call in calls])
    came = np.cumprod(np.pad(rates[:, :-1], ((0, 0), (1, 0)), constant_values=1), axis=1)
    came *= np.array([call.rounds for call in calls])[:, None]
    total = came.sum(0)
    return (rates * came).sum(0) / np.maximum(total, 1), total
