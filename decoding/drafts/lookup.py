"""Prompt lookup: drafts the earlier continuations of the text's last few tokens.

Saxena 2023 (prompt lookup decoding) copies one continuation; Lookahead (Zhao et al. 2024, Ant
Group) merges several into a trie, so that shared prefixes are verified once. Its host-side trie is
replaced here by tables on the device, one per n-gram size, that map an n-gram's hash to the
positions where it last ended. Each match is compared with the text, so a hash collision costs at
most one candidate.
"""

import flax.struct
import jax
import jax.numpy as jnp

from decoding import tree as tree_lib
from decoding.drafter import Context, Drafter, Method, Outcome, Prompt, Proposal, Text
from decoding.tree import DraftTree

# Assumed acceptance rate per token. It decides how a limited budget of nodes is divided between
# several short branches and one long one.
SURVIVAL = 0.8


@flax.struct.dataclass
class State:
    """Positions where n-grams ended in each row's text, if a token followed.

    Attributes:
      table: int32 `[B, sizes, buckets, branches]`: the last positions whose n-gram has that hash,
        newest first, padded with -1.
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
      nodes: of the tree, the root included. If more are found, those with the highest scores are
        kept (see `trie`): shared by many continuations with long matches, and shallow.
      length: maximum tokens per continuation.
      branches: maximum number of continuations: longest match first, then latest.
      longest: n-gram size to match; falls back to shorter ones, down to one token.
      buckets: rows of the hash table, a power of two; by default as many as the text has positions.

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
        start_BA, weight_BA = _matches(state, text, longest, branches)
        token_BAL, valid_BAL = _continuations(text, start_BA, length)
        valid_BAL &= weight_BA[..., None] > 0
        root_B = tree_lib.at(text.token_BS, text.length_B - 1)
        return Proposal(trie(root_B, token_BAL, valid_BAL, weight_BA, nodes), state)

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
    token_BAL: jax.Array,
    valid_BAL: jax.Array,
    weight_BA: jax.Array,
    nodes: int,
) -> DraftTree:
    """Merges K continuations into a tree in which each shared prefix appears once.

    The score of a prefix is the total weight of the continuations that begin with it, discounted by
    its length (`SURVIVAL`). Its own prefixes always score higher, so the best `nodes - 1` form a
    tree.

    Args:
      root_B: int32, the token that all of them continue.
      token_BAL: int32.
      valid_BAL: bool: the first few tokens of each.
      weight_BA: positive where any of its tokens is valid.
      nodes: of the tree, the root included; at most K L + 1.
    """
    b, k, l = token_BAL.shape
    both = valid_BAL[:, :, None] & valid_BAL[:, None]
    same = both & (token_BAL[:, :, None] == token_BAL[:, None])
    same_BAAL = jnp.cumprod(same, axis=-1) > 0  # prefixes up to here are equal
    first_BAL = jnp.argmax(same_BAAL, axis=2)
    is_node_BAL = valid_BAL & (first_BAL == jnp.arange(k)[:, None])
    score_BAL = jnp.einsum('bijl,bj->bil', same_BAAL.astype(jnp.float32), weight_BA)
    score_BAL = jnp.where(is_node_BAL, score_BAL * SURVIVAL ** jnp.arange(l), 0.0)
    score_BT, chosen_BT = jax.lax.top_k(score_BAL.reshape(b, k * l), nodes - 1)
    # for each entry of the grid, its node in the tree
    batch = jnp.arange(b)[:, None]
    slot = jnp.zeros((b, k * l), jnp.int32).at[batch, chosen_BT].set(jnp.arange(1, nodes))
    above_BAL = slot[batch[..., None], (first_BAL * l + jnp.arange(l))[..., :-1].reshape(b, k, -1)]
    # first tokens are children of the root
    above_BAL = jnp.pad(above_BAL, ((0, 0), (0, 0), (1, 0)))

    def pick(x_BAL, root, otherwise):
        x_BT = jnp.take_along_axis(x_BAL.reshape(b, k * l), chosen_BT, axis=1)
        x_BT = jnp.where(score_BT > 0, x_BT, otherwise)
        return jnp.concatenate([root[:, None], x_BT], axis=1).astype(jnp.int32)

    zero_B = jnp.zeros(b, jnp.int32)
    depth_BAL = jnp.broadcast_to(jnp.arange(1, l + 1), (b, k, l))
    return DraftTree(
        pick(token_BAL, root_B, 0),
        pick(above_BAL, zero_B - 1, 0),
        pick(depth_BAL, zero_B, 1),
        jnp.concatenate([zero_B[:, None] == 0, score_BT > 0], axis=1),
    )


def _windows(text: Text, end_BM: jax.Array, size: int) -> jax.Array:
    """Returns the `size` tokens that end at each position, `[B, M, size]`."""
    place = end_BM[..., None] + jnp.arange(1 - size, 1)
    place = jnp.clip(place, 0, text.token_BS.shape[1] - 1)
    return text.token_BS[jnp.arange(end_BM.shape[0])[:, None, None], place]


def _hash(window_BML: jax.Array, buckets: int) -> jax.Array:
    """Returns the bucket of each n-gram, int32 `[B, M]`: multiply and xor, then mixed."""
    code = jnp.zeros(window_BML.shape[:-1], jnp.uint32)
    for i in range(window_BML.shape[-1]):
        code = (code ^ window_BML[..., i].astype(jnp.uint32)) * jnp.uint32(0x9E3779B1)
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
    """Returns the table with the n-grams of all sizes that end at one position of each text."""
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
    """Returns where continuations start, and how many tokens before them match.

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
    # a position whose long n-gram matches is found again under its shorter ones
    twin = (end_BM[..., None] == end_BM[:, None]) & (weight_BM[:, None] > 0)
    again_BM = jnp.any(twin & jnp.tri(end_BM.shape[1], k=-1, dtype=bool), axis=-1)
    weight_BM = jnp.where(again_BM, 0, weight_BM)
    order_BA = jnp.argsort(weight_BM == 0, axis=1, stable=True)[:, :branches]
    return end_BM[batch, order_BA] + 1, weight_BM[batch, order_BA].astype(jnp.float32)


def _continuations(text: Text, start_BA: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Returns the tokens from each start, `[B, A, length]`, and which of them are in the text."""
    place = start_BA[..., None] + jnp.arange(length)
    last = text.token_BS.shape[1] - 1
    batch = jnp.arange(start_BA.shape[0])[:, None, None]
    token = text.token_BS[batch, jnp.clip(place, 0, last)]
    return token, place < text.length_B[:, None, None]
