"""Counts of offered and accepted drafts, by depth and by rank among siblings."""

import flax.struct
import jax
import jax.numpy as jnp

from decoding.drafter import Method, Verdict
from decoding.tree import DraftTree


@flax.struct.dataclass
class Counts:
    """Counts so far; the acceptance rate at a depth or rank is accepted / offered.

    Attributes:
      rounds_B: target passes while the row was live.
      offered_BP, accepted_BP: by depth: walks that were offered a child there, and walks that
        accepted one.
      offered_BA, accepted_BA: the same by a child's rank among its siblings.
    """

    rounds_B: jax.Array
    offered_BP: jax.Array
    accepted_BP: jax.Array
    offered_BA: jax.Array
    accepted_BA: jax.Array


def none(batch: int, method: Method) -> Counts:
    """Returns the counts before the first round of a method's trees."""
    by_depth = jnp.zeros((batch, method.depth + 1), jnp.int32)
    by_rank = jnp.zeros((batch, max(method.branching, 1)), jnp.int32)
    return Counts(jnp.zeros(batch, jnp.int32), by_depth, by_depth, by_rank, by_rank)


def add(counts: Counts, live_B: jax.Array, drafted: DraftTree, verdict: Verdict) -> Counts:
    """Returns the counts after one more round.

    Args:
      counts: before the round.
      live_B: bool, rows that were not done.
      drafted, verdict: of the round.
    """
    path_BP, accepted_B = verdict.path_BP, verdict.accepted_B
    siblings_BTT = (drafted.parent_BT[:, None] == drafted.parent_BT[..., None]) & (
        drafted.valid_BT[:, None]
    )
    nodes = jnp.arange(drafted.parent_BT.shape[1])
    rank_BT = jnp.sum(siblings_BTT & (nodes < nodes[:, None]), axis=-1)
    children_BT = jnp.sum(
        (drafted.parent_BT[:, None] == nodes[:, None]) & drafted.valid_BT[:, None], axis=-1
    )
    depths = jnp.arange(path_BP.shape[1])
    visited_BP = (depths <= accepted_B[:, None]) & live_B[:, None]
    arrived_BP = visited_BP & (depths > 0)
    children_BP = jnp.take_along_axis(children_BT, path_BP, axis=1)
    rank_BP = jnp.take_along_axis(rank_BT, path_BP, axis=1)
    offered_BP = visited_BP & (children_BP > 0)
    ranks = jnp.arange(counts.offered_BA.shape[1])
    offered_BA = jnp.sum(visited_BP[..., None] & (ranks < children_BP[..., None]), axis=1)
    accepted_BA = jnp.sum(arrived_BP[..., None] & (rank_BP[..., None] == ranks), axis=1)
    return Counts(
        rounds_B=counts.rounds_B + live_B,
        # a node at depth d offers its children at depth d + 1
        offered_BP=counts.offered_BP + jnp.roll(offered_BP, 1, axis=1) * (depths > 0),
        accepted_BP=counts.accepted_BP + arrived_BP,
        offered_BA=counts.offered_BA + offered_BA,
        accepted_BA=counts.accepted_BA + accepted_BA,
    )
