"""Prompt lookup: what followed the last few tokens earlier in the text is drafted again.

Saxena 2023 (prompt lookup decoding) copies one continuation; Lookahead (Zhao et al. 2024, Ant
Group) merges several into a trie, so that shared prefixes are verified once. Its host-side trie is
replaced here by tables on the device: for each n-gram size, from an n-gram's hash to the places
where it last ended. Each match is compared with the text, so that a hash collision costs at most a
candidate.
"""

import flax.struct
import jax
import jax.numpy as jnp

from decoding import tree as tree_lib
from decoding.drafter import Context, Drafter, Method, Outcome, Prompt, Proposal, Text
from decoding.tree import DraftTree

# A draft stays right with about this probability per token: settles where the nodes go when the
# budget does not hold all that was found, several short branches or one long.
SURVIVAL = 0.8


@flax.struct.dataclass
class State:
    """Where n-grams ended in each row's text; only those that a token followed.

    Attributes:
      table: int32 `[B, sizes, buckets, branches]`: the last places whose n-gram has that hash,
        newest first; -1 where there are fewer.
      indexed_B: int32: n-grams that end before this position are in the table.
    """

    table: jax.Array
    indexed_B: jax.Array


def lookup(
    *,
    nodes: int = 16,
    length: int = 8,
    branches: int = 4,
    longest: int = 3,
    buckets: int | None = None,
) -> Drafter:
    """Returns the drafter; its trees do not depend on the draws that verify them.

    Args:
      nodes: of the tree, the root included. Where more were found, those shared by most of the
        continuations stay, weighted by how much text they matched, and the shallow ones.
      length: tokens of a continuation at most.
      branches: continuations at most: of the longest match first, then the latest.
      longest: n-gram size to match; falls back to shorter ones, down to one token.
      buckets: rows of the hash table, a power of two; by default as many as the text has places.

    Raises:
      ValueError: a size is out of range.
    """
    sizes = {'nodes': nodes, 'length': length, 'branches': branches, 'longest': longest}
    for name, value in sizes.items():
        least = 2 if name == 'nodes' else 1
        if value < least:
            raise ValueError(f'lookup: {name} = {value}; expected at least {least}')
    if buckets is not None and (buckets < 1 or buckets & (buckets - 1)):
        raise ValueError(f'lookup: {buckets} buckets; expected a power of two')
    nodes = min(nodes, 1 + branches * length)

    def init(params, prompt: Prompt, /, **extra) -> State:
        text = prompt.text
        s = text.token_BS.shape[1]
        count = buckets or 1 << (s - 1).bit_length()
        tables = [_index(text, size, count, branches) for size in range(longest, 0, -1)]
        return State(jnp.stack(tables, axis=1), text.length_B - 1)

    def propose(params, state: State, context: Context, /, **extra) -> Proposal:
        text = context.text
        start_BK, weight_BK = _matches(state, text, longest, branches)
        token_BKL, valid_BKL = _continuations(text, start_BK, length)
        valid_BKL &= weight_BK[..., None] > 0
        root_B = tree_lib.at(text.token_BS, text.length_B - 1)
        return Proposal(trie(root_B, token_BKL, valid_BKL, weight_BK, nodes), state)

    def update(params, state: State, outcome: Outcome, /, **extra) -> State:
        # a round adds at most length + 1 tokens
        table = jax.lax.fori_loop(
            0, length + 1,
            lambda i, table: _insert(table, outcome.text, state.indexed_B + i, longest),
            state.table,
        )  # fmt: skip
        return State(table, outcome.text.length_B - 1)

    return Drafter(Method(init, propose, update, DraftTree, nodes, length, branches))


def trie(
    root_B: jax.Array,
    token_BKL: jax.Array,
    valid_BKL: jax.Array,
    weight_BK: jax.Array,
    nodes: int,
) -> DraftTree:
    """Merges K continuations into a tree in which each prefix they share appears once.

    A prefix scores the weights of the continuations that begin with it, discounted by its length
    (`SURVIVAL`). A prefix's own prefix always scores more, so that the best `nodes - 1` are a tree.

    Args:
      root_B: int32, the token that all of them continue.
      token_BKL: int32.
      valid_BKL: bool: the first few tokens of each.
      weight_BK: positive where any of its tokens is valid.
      nodes: of the tree, the root included; at most K L + 1.
    """
    b, k, l = token_BKL.shape
    both = valid_BKL[:, :, None] & valid_BKL[:, None]
    same = both & (token_BKL[:, :, None] == token_BKL[:, None])
    same_BKKL = jnp.cumprod(same, axis=-1) > 0  # prefixes up to here are equal
    first_BKL = jnp.argmax(same_BKKL, axis=2)
    is_node_BKL = valid_BKL & (first_BKL == jnp.arange(k)[:, None])
    score_BKL = jnp.einsum('bijl,bj->bil', same_BKKL.astype(jnp.float32), weight_BK)
    score_BKL = jnp.where(is_node_BKL, score_BKL * SURVIVAL ** jnp.arange(l), 0.0)
    score_BT, chosen_BT = jax.lax.top_k(score_BKL.reshape(b, k * l), nodes - 1)
    # of the whole grid, which node of the tree it became
    batch = jnp.arange(b)[:, None]
    slot = jnp.zeros((b, k * l), jnp.int32).at[batch, chosen_BT].set(jnp.arange(1, nodes))
    above_BKL = slot[batch[..., None], (first_BKL * l + jnp.arange(l))[..., :-1].reshape(b, k, -1)]
    above_BKL = jnp.pad(above_BKL, ((0, 0), (0, 0), (1, 0)))  # first tokens hang on the root

    def pick(x_BKL, root, otherwise):
        x_BT = jnp.take_along_axis(x_BKL.reshape(b, k * l), chosen_BT, axis=1)
        x_BT = jnp.where(score_BT > 0, x_BT, otherwise)
        return jnp.concatenate([root[:, None], x_BT], axis=1).astype(jnp.int32)

    zero_B = jnp.zeros(b, jnp.int32)
    depth_BKL = jnp.broadcast_to(jnp.arange(1, l + 1), (b, k, l))
    return DraftTree(
        pick(token_BKL, root_B, 0),
        pick(above_BKL, zero_B - 1, 0),
        pick(depth_BKL, zero_B, 1),
        jnp.concatenate([zero_B[:, None] == 0, score_BT > 0], axis=1),
    )


def _windows(text: Text, end_BM: jax.Array, size: int) -> jax.Array:
    """Returns the `size` tokens that end at each place, `[B, M, size]`."""
    place = end_BM[..., None] + jnp.arange(1 - size, 1)
    place = jnp.clip(place, 0, text.token_BS.shape[1] - 1)
    return text.token_BS[jnp.arange(end_BM.shape[0])[:, None, None], place]


def _hash(window_BMG: jax.Array, buckets: int) -> jax.Array:
    """Returns the bucket of each n-gram, int32 `[B, M]`: multiply and xor, then mixed."""
    code = jnp.zeros(window_BMG.shape[:-1], jnp.uint32)
    for i in range(window_BMG.shape[-1]):
        code = (code ^ window_BMG[..., i].astype(jnp.uint32)) * jnp.uint32(0x9E3779B1)
        code ^= code >> 15
    return (code & (buckets - 1)).astype(jnp.int32)


def _index(text: Text, size: int, buckets: int, branches: int) -> jax.Array:
    """Returns the table of all n-grams of one size, `[B, buckets, branches]`."""
    b, s = text.token_BS.shape
    batch = jnp.arange(b)[:, None]
    end_BS = jnp.broadcast_to(jnp.arange(s), (b, s))
    bucket_BS = _hash(_windows(text, end_BS, size), buckets)
    left_BS = jnp.where((end_BS >= size - 1) & (end_BS < text.length_B[:, None] - 1), end_BS, -1)
    columns = []
    for _ in range(branches):  # the latest of each bucket, then the latest of the others
        latest = jnp.full((b, buckets), -1, jnp.int32).at[batch, bucket_BS].max(left_BS)
        left_BS = jnp.where(latest[batch, bucket_BS] == left_BS, -1, left_BS)
        columns.append(latest)
    return jnp.stack(columns, axis=-1)


def _insert(table: jax.Array, text: Text, end_B: jax.Array, longest: int) -> jax.Array:
    """Returns the table with the n-grams of all sizes that end at one place of each text."""
    buckets = table.shape[2]
    batch = jnp.arange(end_B.shape[0])
    for row, size in enumerate(range(longest, 0, -1)):
        bucket_B = _hash(_windows(text, end_B[:, None], size), buckets)[:, 0]
        older = table[batch, row, bucket_B]
        newer = jnp.concatenate([end_B[:, None], older[:, :-1]], axis=1)
        fits_B = (end_B >= size - 1) & (end_B < text.length_B - 1)
        target_B = jnp.where(fits_B, bucket_B, buckets)  # out of range: dropped
        table = table.at[batch, row, target_B].set(newer, mode='drop')
    return table


def _matches(state: State, text: Text, longest: int, branches: int) -> tuple[jax.Array, jax.Array]:
    """Returns where continuations start, and the number of tokens before it that match.

    int32 and f32 `[B, branches]`; 0 tokens where there is no match.
    """
    batch = jnp.arange(text.length_B.shape[0])[:, None]
    last_B1 = text.length_B[:, None] - 1
    ends, weights = [], []
    for row, size in enumerate(range(longest, 0, -1)):
        suffix = _windows(text, last_B1, size)
        end = state.table[batch[:, 0], row, _hash(suffix, state.table.shape[2])[:, 0]]
        same = jnp.all(_windows(text, end, size) == suffix, axis=-1)
        ends.append(end)
        weights.append(jnp.where(same & (end >= 0) & (last_B1 >= size - 1), size, 0))
    end_BM, weight_BM = jnp.concatenate(ends, axis=1), jnp.concatenate(weights, axis=1)
    # a place whose long n-gram matches is found under its shorter ones again
    twin = (end_BM[..., None] == end_BM[:, None]) & (weight_BM[:, None] > 0)
    again_BM = jnp.any(twin & jnp.tri(end_BM.shape[1], k=-1, dtype=bool), axis=-1)
    weight_BM = jnp.where(again_BM, 0, weight_BM)
    order_BK = jnp.argsort(weight_BM == 0, axis=1, stable=True)[:, :branches]
    return end_BM[batch, order_BK] + 1, weight_BM[batch, order_BK].astype(jnp.float32)


def _continuations(text: Text, start_BK: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Returns the tokens from each start, `[B, K, length]`, and which of them the text has."""
    place = start_BK[..., None] + jnp.arange(length)
    last = text.token_BS.shape[1] - 1
    batch = jnp.arange(start_BK.shape[0])[:, None, None]
    token = text.token_BS[batch, jnp.clip(place, 0, last)]
    return token, place < text.length_B[:, None, None]
