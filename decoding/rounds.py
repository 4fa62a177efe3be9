"""The device side of decoding: prefill, one round, and the loop over rounds."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from decoding import sample, tree
from decoding import stop as stop_lib
from decoding.drafter import Begun, Drafter, Outcome, Text, Verdict, Verifier
from decoding.sample import Sampler
from decoding.tree import DraftTree
from lm.kernels.mask import Mask, pack_bits
from lm.model import cache as cache_lib
from lm.model import tables, transformer
from lm.model.cache import Cache
from lm.model.config import Config
from lm.model.params import Params


class Plan(NamedTuple):
    """What is compiled into the loop: functions and sizes, no arrays.

    Attributes:
      config: of the target.
      drafter: without its parameters.
      verifier: see `Verifier`.
      bos: id that is never drawn, or None.
      rows: of the cache: the longest text, and one tree.
    """

    config: Config
    drafter: Drafter
    verifier: Verifier
    bos: int | None
    rows: int


@flax.struct.dataclass
class Counts:
    """What happened so far; a depth's and a rank's share of acceptances is accepted / offered.

    Attributes:
      rounds_B: target passes while the row was live.
      offered_BP, accepted_BP: at each depth, walks that found a child there, and took one.
      offered_BR, accepted_BR: the same for a child's rank among its siblings.
    """

    rounds_B: jax.Array
    offered_BP: jax.Array
    accepted_BP: jax.Array
    offered_BR: jax.Array
    accepted_BR: jax.Array


@flax.struct.dataclass
class State:
    """What a round changes.

    Attributes:
      text: prompts and continuations.
      cache: the target's; holds `text.length_B - 1` rows.
      draft: the drafter's state.
      tables: the target's, drawn for these texts; None where they are learned.
      stop_B: state of each row's stop automaton.
      limit_B: length at which a row ends.
      done_B: rows that are finished.
      counts: see `Counts`.
    """

    text: Text
    cache: Cache
    draft: Any
    tables: Params | None
    stop_B: jax.Array
    limit_B: jax.Array
    done_B: jax.Array
    counts: Counts


@functools.partial(jax.jit, static_argnums=0)
def prefill(
    plan: Plan, params: Params, draft_params: Any, prompt_BL: jax.Array, text: Text,
    limit_B: jax.Array, stop_B: jax.Array,
) -> State:  # fmt: skip
    """Reads the prompts; returns the state before the first round."""
    config, drafter = plan.config, plan.drafter
    b, l = prompt_BL.shape
    cache = cache_lib.init(config, b, plan.rows)
    own = tables.for_texts(params['tables'], config, text.key_B)
    params = params if own is None else {**params, 'tables': own}
    positions_BL = jnp.broadcast_to(jnp.arange(l), (b, l))
    x_BLD = tables.embed(params['tables'], config, prompt_BL)
    _, read = transformer.body(params['body'], config, x_BLD, positions_BL, cache=cache)
    assert read is not None
    cache = cache_lib.truncate(read, text.length_B - 1)
    draft = drafter.init(draft_params, text, plan.rows)
    by_depth = jnp.zeros((b, drafter.depth + 1), jnp.int32)
    by_rank = jnp.zeros((b, max(drafter.branching, 1)), jnp.int32)
    counts = Counts(jnp.zeros(b, jnp.int32), by_depth, by_depth, by_rank, by_rank)
    done_B = text.length_B >= limit_B
    return State(text, cache, draft, own, stop_B, limit_B, done_B, counts)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def loop(
    plan: Plan, params: Params, draft_params: Any, sampler: Sampler, stops: jax.Array,
    state: State, rounds: jax.Array,
) -> State:  # fmt: skip
    """Runs rounds until every row is done, or as many as given."""

    def unfinished(carry):
        state, done = carry
        return ~jnp.all(state.done_B) & (done < rounds)

    def run(carry):
        state, done = carry
        return one_round(plan, params, draft_params, sampler, stops, state), done + 1

    return jax.lax.while_loop(unfinished, run, (state, jnp.zeros((), jnp.int32)))[0]


def one_round(
    plan: Plan, params: Params, draft_params: Any, sampler: Sampler, stops: jax.Array, state: State
) -> State:
    """Drafts, verifies and commits once; every live row gains at least one token."""
    drafter, text = plan.drafter, state.text
    params = params if state.tables is None else {**params, 'tables': state.tables}
    drafted, draft, begun = drafter.propose(draft_params, state.draft, text, params, state.cache)
    logits_BTV, cache = target_pass(plan, params, drafted, begun, text, state.cache)
    logprob_BTV = law(plan, sampler, drafted, logits_BTV, text)
    verdict = plan.verifier.verify(drafted, logprob_BTV, text, drafter.depth, drafter.branching)
    state = dataclasses.replace(state, cache=cache, draft=draft)
    return commit(plan, draft_params, stops, state, drafted, logits_BTV, verdict)


def commit(
    plan: Plan, draft_params: Any, stops: jax.Array, state: State, drafted: DraftTree,
    logits_BTV: jax.Array, verdict: Verdict,
) -> State:  # fmt: skip
    """Returns what a round leaves, from the state with the caches as drafting and verifying did."""
    emitted_BP = _emitted(drafted, verdict)
    count_B, stop_B, stopped_B = _stop(stops, state, emitted_BP, verdict)
    root_B = state.text.length_B - 1
    after = _append(state.text, emitted_BP, count_B)
    outcome = Outcome(drafted, logits_BTV, verdict, after)
    return State(
        text=after,
        cache=cache_lib.keep(state.cache, root_B, verdict.path_BP, count_B),
        draft=plan.drafter.update(draft_params, state.draft, outcome),
        tables=state.tables,
        stop_B=stop_B,
        limit_B=state.limit_B,
        done_B=state.done_B | stopped_B | (after.length_B >= state.limit_B),
        counts=_count(state, drafted, verdict),
    )


def target_pass(
    plan: Plan, params: Params, drafted: DraftTree, begun: Begun | None, text: Text, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Runs the target over the nodes of a tree: logits f32 `[B, T, V]`, and T more cache rows."""
    config, drafter = plan.config, plan.drafter
    positions_BT = (text.length_B - 1)[:, None] + drafted.depth_BT
    bits_BTW = None
    if drafter.nodes > 1:
        bits_BTW = pack_bits(tree.ancestors(drafted, drafter.depth))
    if begun is None:
        logits_BTV, cache = transformer.step(
            params, config, drafted.token_BT, cache, positions_BL=positions_BT,
            ancestors_BLW=bits_BTW,
        )  # fmt: skip
    else:
        mask = Mask(positions_BT, positions_BT[:, None], ancestors=bits_BTW)
        deeper = (drafter.shared_layers, config.n_layers)
        x_BTD, longer = transformer.blocks(
            params['body'], config, begun.x_BTD, mask, begun.cache, only=deeper
        )
        assert longer is not None
        cache = longer
        h_BTD = transformer.final_norm(params['body'], config, x_BTD)
        logits_BTV = tables.unembed(params['tables'], config, h_BTD)
    if plan.bos is not None:
        logits_BTV = logits_BTV.at[..., plan.bos].set(-jnp.inf)
    return logits_BTV, cache


def law(
    plan: Plan, sampler: Sampler, drafted: DraftTree, logits_BTV: jax.Array, text: Text
) -> jax.Array:
    """Returns the target's law after each node, log-probabilities `[B, T, V]`."""
    seen_BTV = None
    if sampler.repetition_penalty is not None:
        b, s = text.token_BS.shape
        vocab_size = logits_BTV.shape[-1]
        live_BS = jnp.arange(s) < text.length_B[:, None]
        token_BS = jnp.where(live_BS, text.token_BS, vocab_size)
        rows = jnp.arange(b)[:, None]
        in_text = jnp.zeros((b, vocab_size), bool).at[rows, token_BS].set(True, mode='drop')
        on_path = tree.ancestors(drafted, plan.drafter.depth).astype(jnp.float32)
        tokens = jax.nn.one_hot(drafted.token_BT, vocab_size)
        seen_BTV = in_text[:, None] | (jnp.einsum('bij,bjv->biv', on_path, tokens) > 0)
    return sample.log_law(sampler, logits_BTV, seen_BTV)


def _emitted(drafted: DraftTree, verdict: Verdict) -> jax.Array:
    """Returns the round's tokens `[B, depth + 1]`: accepted ones, then the one drawn after them."""
    path_BP = verdict.path_BP
    tokens_BP = jnp.take_along_axis(drafted.token_BT, path_BP, axis=1)
    shifted = jnp.roll(tokens_BP, -1, axis=1)
    last = jnp.arange(path_BP.shape[1]) >= verdict.accepted_B[:, None]
    return jnp.where(last, verdict.next_B[:, None], shifted)


def _stop(
    stops: jax.Array, state: State, emitted_BP: jax.Array, verdict: Verdict
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns how many tokens each row keeps, its automaton's state, and whether it stopped."""
    room_B = state.limit_B - state.text.length_B
    count_B = jnp.minimum(verdict.accepted_B + 1, room_B)
    count_B = jnp.where(state.done_B, 0, count_B)
    stop_B, stopped_B, kept_B = state.stop_B, jnp.zeros_like(state.done_B), jnp.zeros_like(count_B)
    for i in range(emitted_BP.shape[1]):
        live_B = (i < count_B) & ~stopped_B
        stop_B = jnp.where(live_B, stop_lib.advance(stops, stop_B, emitted_BP[:, i]), stop_B)
        stopped_B |= live_B & stop_lib.stopped(stop_B)
        kept_B += live_B
    return kept_B, stop_B, stopped_B


def _append(text: Text, emitted_BP: jax.Array, count_B: jax.Array) -> Text:
    b, p = emitted_BP.shape
    column_BP = text.length_B[:, None] + jnp.arange(p)
    column_BP = jnp.where(jnp.arange(p) < count_B[:, None], column_BP, text.token_BS.shape[1])
    token_BS = text.token_BS.at[jnp.arange(b)[:, None], column_BP].set(emitted_BP, mode='drop')
    return dataclasses.replace(text, token_BS=token_BS, length_B=text.length_B + count_B)


def _count(state: State, drafted: DraftTree, verdict: Verdict) -> Counts:
    live_B = ~state.done_B
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
    ranks = jnp.arange(state.counts.offered_BR.shape[1])
    offered_BR = jnp.sum(visited_BP[..., None] & (ranks < children_BP[..., None]), axis=1)
    accepted_BR = jnp.sum(arrived_BP[..., None] & (rank_BP[..., None] == ranks), axis=1)
    old = state.counts
    return Counts(
        rounds_B=old.rounds_B + live_B,
        # a node at depth d offers its children at depth d + 1
        offered_BP=old.offered_BP + jnp.roll(offered_BP, 1, axis=1) * (depths > 0),
        accepted_BP=old.accepted_BP + arrived_BP,
        offered_BR=old.offered_BR + offered_BR,
        accepted_BR=old.accepted_BR + accepted_BR,
    )
