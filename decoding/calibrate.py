"""Chooses the size of draft trees for a machine.

A larger tree yields more accepted tokens, but its pass takes longer. `measure` times the passes;
the expected tokens follow from the acceptance rates of earlier calls (`generate.Metrics`), as in
Sequoia (Chen et al. 2024, arXiv 2402.12374, section 4.2) and Parallel Prompt Decoding (Chen et al.
2024, arXiv 2405.18628, section 4).
"""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from decoding import scores
from decoding.drafts.template import Template, best_first
from decoding.model import LM
from lm.files import json_fields
from lm.kernels.mask import pack_bits
from lm.model import contract
from lm.model.contract import Nodes


class Curve(NamedTuple):
    """Seconds per pass of the target, by number of nodes per tree, ascending."""

    nodes: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, nodes: int) -> float:
        """Returns the seconds of a pass over trees of `nodes` nodes, interpolated linearly."""
        return float(np.interp(nodes, self.nodes, self.seconds))


class Choice(NamedTuple):
    """A tree for a machine.

    Attributes:
      template: the tree.
      tokens: expected per round, including the one drawn after the accepted path.
      speedup: over decoding without drafts.
    """

    template: Template
    tokens: float
    speedup: float


def measure(
    lm: LM, batch: int, rows: int, nodes: Sequence[int] = (1, 2, 4, 8, 16, 32), repeats: int = 9
) -> Curve:
    """Returns the median time of a pass for several tree sizes, timed in turn.

    Args:
      lm: the target, preferably from `model.for_decoding`.
      batch: texts decoded together.
      rows: length of the texts; the first half is prefilled.
      nodes: sizes to time.
      repeats: passes of each size.
    """
    model, half_B = lm.model, jnp.full(batch, rows // 2, jnp.int32)
    key_B = jax.random.split(jax.random.key(0), batch)

    @jax.jit
    def start(params):
        prompt = contract.chain(jnp.zeros((batch, rows // 2), jnp.int32))
        return model.start(params, prompt, half_B, rows + max(nodes), key_B).memory

    @functools.partial(jax.jit, donate_argnums=2)
    def run(params, token_BT, memory):
        t = token_BT.shape[1]
        # A node that sees only itself costs as much as any other.
        bits_BTW = pack_bits(jnp.broadcast_to(jnp.eye(t, dtype=bool), (batch, t, t)))
        tree = Nodes(token_BT, half_B[:, None] + jnp.arange(t), bits_BTW if t > 1 else None)
        memory, seen = model.step(params, memory, tree)
        best_BTA = scores.of_head(model.head(params, memory, seen.h_BTD)).top(1)
        return best_BTA, model.keep(memory, None, jnp.zeros_like(half_B))

    memory = start(lm.params)
    seconds: dict[int, list[float]] = {t: [] for t in sorted(nodes)}
    for repeat in range(repeats + 1):
        for t, into in seconds.items():
            token_BT = jnp.zeros((batch, t), jnp.int32)
            begin = time.perf_counter()
            _, memory = jax.block_until_ready(run(lm.params, token_BT, memory))
            if repeat:  # the first one compiles
                into.append(time.perf_counter() - begin)
    return Curve(tuple(seconds), tuple(float(np.median(times)) for times in seconds.values()))


def remembered(path: epath.PathLike, about: Mapping[str, Any], find: Callable[[], Curve]) -> Curve:
    """Returns the curve cached in a JSON file; without one, measures it and writes the file.

    Args:
      path: the file.
      about: everything the curve depends on: machine, model, batch and so on. A file about
        anything else is overwritten.
      find: measures the curve.
    """
    file = epath.Path(path)
    key = json.loads(json.dumps(dict(about)))
    try:
        held = json_fields.read(file)
        if held['about'] == key:
            return _curve(held['nodes'], held['seconds'])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing or damaged
    curve = find()
    file.write_text(json.dumps({'about': key, **curve._asdict()}, indent=2) + '\n')
    return curve


def rates(
    by_rank: Sequence[float], by_depth: Sequence[float] | None = None
) -> Callable[[int, int], float]:
    """Returns (depth, rank) -> acceptance rate of a candidate, given that its parent was accepted.

    Each depth's rate is split among the ranks in proportion to `by_rank`. Beyond the deepest
    measured depth, the last rate applies.

    Args:
      by_rank, by_depth: as in `generate.Metrics`; without `by_depth`, all depths are alike.
    """
    rank_rates = falling(by_rank)
    total = float(rank_rates.sum())
    depth_rates = (total,) if by_depth is None else tuple(by_depth)

    def rate(depth: int, rank: int) -> float:
        found = depth_rates[min(depth, len(depth_rates)) - 1]
        return float(rank_rates[rank]) * found / total

    return rate


def falling(by_rank: Sequence[float]) -> np.ndarray:
    """Returns rates that `template.best_first` accepts: non-increasing and in (0, 1)."""
    return np.minimum.accumulate(np.clip(np.asarray(by_rank, np.float64), 1e-6, 1 - 1e-6))


def expected_tokens(template: Template, rate: Callable[[int, int], float]) -> float:
    """Returns the expected tokens per round: 1 + the sum of the nodes' acceptance probabilities."""
    reached = np.ones(len(template.parent))
    for node in range(1, len(reached)):
        parent, rank, depth = (int(x[node]) for x in template)
        reached[node] = reached[parent] * rate(depth, rank)
    return float(reached.sum())


def best_nodes(
    curve: Curve, by_rank: Sequence[float], by_depth: Sequence[float] | None = None,
    draft_seconds: float = 0.0,
) -> Choice:  # fmt: skip
    """Returns the tree with the most expected tokens per second.

    Args:
      curve: of the target; trees up to its largest size are considered.
      by_rank, by_depth: see `rates`.
      draft_seconds: drafting time per level of a tree.
    """
    rate = rates(by_rank, by_depth)
    plain = curve.at(1)

    def choice(nodes: int) -> Choice:
        template = best_first(falling(by_rank), nodes)
        tokens = expected_tokens(template, rate)
        seconds = curve.at(nodes) + draft_seconds * int(np.max(template.depth))
        return Choice(template, tokens, tokens * plain / seconds)

    return max(map(choice, range(1, curve.nodes[-1] + 1)), key=lambda c: c.speedup)


def _curve(nodes: Sequence[int], seconds: Sequence[float]) -> Curve:
    """Returns the curve read from JSON; raises ValueError or TypeError if it is invalid."""
    sizes, times = np.asarray(nodes), np.asarray(seconds, np.float64)
    whole = sizes.dtype.kind == 'i' and sizes.ndim == 1 and sizes.size
    if not whole or np.any(np.diff(sizes, prepend=0) <= 0) or times.shape != sizes.shape:
        raise ValueError('invalid curve: sizes do not increase, or times are missing')
    if not np.all((times > 0) & (times < np.inf)):
        raise ValueError('invalid curve: a time is not positive')
    return Curve(tuple(nodes), tuple(seconds))
