"""Tree templates: fixed shapes of draft trees, by parent and by rank among the candidates."""

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from decoding.tree import DraftTree


class Template(NamedTuple):
    """T nodes, level by level.

        parent  [-1 0 0 1]      0 - 1 - 3
        rank    [ 0 0 1 0]       \\ 2
        depth   [ 0 1 1 2]

    Attributes:
      parent, rank, depth: int `[T]`: a node's parent, its rank among the parent's candidates, and
        its level; the root comes first.
    """

    parent: np.ndarray
    rank: np.ndarray
    depth: np.ndarray


def acceptance_of(ranks: int) -> np.ndarray:
    """Returns assumed acceptance rates by candidate rank, f64 `[ranks]`.

    A power law, fitted so that `best_first` comes closest to the level sizes of the hand-made tree
    of Token Recycling (8/23/25/17/6/1 for 8/21/25/15/8/3).
    """
    return 0.26 * np.arange(1, ranks + 1) ** -2.5


def best_first(acceptance: Sequence[float] | np.ndarray, nodes: int) -> Template:
    """Returns the template of `nodes` nodes, root included, with the most expected acceptances.

    A node's acceptance probability is taken to be the product of the rates of the ranks on its
    path; no tree of that size has a greater sum of them (compare Sequoia, Chen et al. 2024).

    Args:
      acceptance: rate per rank, non-increasing, in (0, 1).
      nodes: at least 1.

    Raises:
      ValueError: rates or size are out of range.
    """
    _check(acceptance, nodes)
    heap: list[tuple[float, tuple[int, ...]]] = [(-float(acceptance[0]), (0,))]
    paths: list[tuple[int, ...]] = [()]
    while len(paths) < nodes:
        cost, path = heapq.heappop(heap)
        paths.append(path)
        heapq.heappush(heap, (float(cost * acceptance[0]), (*path, 0)))
        rank = path[-1]
        if rank + 1 < len(acceptance):
            sibling = float(cost * acceptance[rank + 1] / acceptance[rank])
            heapq.heappush(heap, (sibling, (*path[:-1], rank + 1)))
    return _template(paths)


def of_levels(acceptance: Sequence[float] | np.ndarray, sizes: Sequence[int]) -> Template:
    """Returns the likeliest template whose levels below the root have the given sizes.

    Raises:
      ValueError: rates are out of range, or a level cannot have so many nodes.
    """
    _check(acceptance, 1 + sum(sizes))
    level: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    paths: list[tuple[int, ...]] = [()]
    for depth, size in enumerate(sizes, 1):
        children = [(v * a, (*p, rank)) for v, p in level for rank, a in enumerate(acceptance)]
        if not 1 <= size <= len(children):
            raise ValueError(f'level {depth}: {size} nodes; expected 1 to {len(children)}')
        level = sorted(children)[:size]
        paths += [path for _, path in level]
    return _template(paths)


def fill(
    template: Template, root_B: jax.Array, candidates: Callable[[jax.Array], jax.Array]
) -> DraftTree:
    """Returns the tree of a template's shape, filled level by level.

    Args:
      template: see `Template`.
      root_B: int32, the root's token.
      candidates: from tokens int32 `[B, M]` to candidates for the next one, int32 `[B, M, ranks]`,
        distinct, best first, padded with negative ids.
    """
    levels_BM = [root_B[:, None]]
    first = 0  # first node of the level above
    for depth in range(1, template.depth[-1] + 1):
        nodes = np.flatnonzero(template.depth == depth)
        above_BM = levels_BM[-1]
        found_BMA = candidates(jnp.maximum(above_BM, 0))
        found_BMA = jnp.where(above_BM[..., None] < 0, -1, found_BMA)
        levels_BM.append(found_BMA[:, template.parent[nodes] - first, template.rank[nodes]])
        first = nodes[0]
    token_BT = jnp.concatenate(levels_BM, axis=1).astype(jnp.int32)
    parent_BT, depth_BT = (
        jnp.broadcast_to(jnp.asarray(x, jnp.int32), token_BT.shape)
        for x in (template.parent, template.depth)
    )
    return DraftTree(jnp.maximum(token_BT, 0), parent_BT, depth_BT, token_BT >= 0)


def _check(acceptance: Sequence[float] | np.ndarray, nodes: int) -> None:
    rates = np.asarray(acceptance)
    if rates.size < 1 or rates.min() <= 0 or rates.max() >= 1 or (np.diff(rates) > 0).any():
        raise ValueError(
            f'acceptance by rank: {rates.tolist()}; expected non-increasing rates in (0, 1)'
        )
    if nodes < 1:
        raise ValueError(f'template: {nodes} nodes; expected at least 1, the root')


def _template(paths: list[tuple[int, ...]]) -> Template:
    paths = sorted(paths, key=lambda path: (len(path), path))
    index = {path: i for i, path in enumerate(paths)}
    return Template(
        parent=np.asarray([index[path[:-1]] if path else -1 for path in paths]),
        rank=np.asarray([path[-1] if path else 0 for path in paths]),
        depth=np.asarray([len(path) for path in paths]),
    )
