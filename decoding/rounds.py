"""The device side of decoding: prefill, one round, and the loop over rounds."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from decoding import counts as counts_lib
from decoding import scores as scores_lib
from decoding import stop as stop_lib
from decoding import tree
from decoding.counts import Counts
from decoding.drafter import Context, Method, Outcome, Prompt, Proposal, Text, Verdict, Verifier
from decoding.sample import Sampler
from decoding.scores import Apply, Distribution, Scores
from decoding.tree import DraftTree
from lm.kernels.mask import pack_bits
from lm.model import contract
from lm.model.contract import Memory, Model, Nodes, Seen


class Plan(NamedTuple):
    """The static part of the loop: functions and sizes, no arrays.

    Attributes:
      model: the target.
      method: the drafter's.
      verifier: see `Verifier`.
      rows: allocated in each memory: the longest text plus one tree.
      transform: changes the logits before the sampler; or None.
    """

    model: Model
    method: Method
    verifier: Verifier
    rows: int
    transform: Apply | None = None


class Inputs(NamedTuple):
    """Arrays that a round reads and never changes.

    Attributes:
      params, draft, transform: of the target, the drafter and the logits transform.
      sampler: see `Sampler`.
      stops: table of the stop automaton.
    """

    params: Any
    draft: Any
    transform: Any
    sampler: Sampler
    stops: jax.Array


@flax.struct.dataclass
class State:
    """The part of the loop's carry that a round changes.

    Attributes:
      text: prompts and continuations.
      memory: the target's; it holds all but each text's last token.
      draft: the drafter's state.
      stop_B: state of each row's stop automaton.
      limit_B: length at which a row ends.
      done_B: whether each row is finished.
      counts: see `Counts`.
    """

    text: Text
    memory: Memory
    draft: Any
    stop_B: jax.Array
    limit_B: jax.Array
    done_B: jax.Array
    counts: Counts


@functools.partial(jax.jit, static_argnums=0)
def prefill(
    plan: Plan, inputs: Inputs, prompt_BL: jax.Array, text: Text, limit_B: jax.Array,
    stop_B: jax.Array,
) -> State:  # fmt: skip
    """Reads the prompts; returns the state before the first round."""
    method, b = plan.method, prompt_BL.shape[0]
    memory, seen = plan.model.start(
        inputs.params, contract.chain(prompt_BL), text.length_B - 1, plan.rows, text.key_B,
        ask=method.ask,
    )  # fmt: skip
    prompt = Prompt(prompt_BL, text, plan.rows, inputs.params, memory, seen)
    draft = method.init(inputs.draft, prompt)
    counts = counts_lib.none(b, method)
    done_B = text.length_B >= limit_B
    return State(text, memory, draft, stop_B, limit_B, done_B, counts)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def loop(plan: Plan, inputs: Inputs, state: State, rounds: jax.Array) -> State:
    """Runs rounds until every row is done, at most `rounds`; the state is donated."""

    def unfinished(carry):
        state, done = carry
        return ~jnp.all(state.done_B) & (done < rounds)

    def run(carry):
        state, done = carry
        return one_round(plan, inputs, state), done + 1

    return jax.lax.while_loop(unfinished, run, (state, jnp.zeros((), jnp.int32)))[0]


def one_round(plan: Plan, inputs: Inputs, state: State) -> State:
    """Drafts, verifies and keeps once; every live row gains at least one token."""
    method, text = plan.method, state.text
    context = Context(text, inputs.params, state.memory)
    proposal = method.propose(inputs.draft, state.draft, context)
    scores, seen, memory = target_pass(plan, inputs.params, proposal, context)
    scored = distribution(plan, inputs, proposal.tree, scores, text)
    verdict = plan.verifier.verify(proposal.tree, scored, text, method.depth, method.branching)
    state = dataclasses.replace(state, memory=memory, draft=proposal.state)
    return commit(plan, inputs, state, proposal.tree, scores, seen, verdict)


def target_pass(
    plan: Plan, params: Any, proposal: Proposal, context: Context
) -> tuple[Scores, Seen, Memory]:
    """Runs the target over the nodes of a tree; its memory then holds T more nodes."""
    model, method, drafted = plan.model, plan.method, proposal.tree
    position_BT = (context.text.length_B - 1)[:, None] + drafted.depth_BT
    bits_BTW = None
    if method.nodes > 1:
        bits_BTW = pack_bits(tree.ancestors(drafted, method.depth))
    nodes, memory = Nodes(drafted.token_BT, position_BT, bits_BTW), context.memory
    if proposal.partial is not None:
        x_BTD, memory = proposal.partial
        nodes = nodes._replace(x_BTD=x_BTD, start_layer=method.shared_layers)
    memory, seen = model.step(params, memory, nodes, ask=method.ask)
    return scores_lib.of_head(model.head(params, memory, seen.h_BTD)), seen, memory


def distribution(
    plan: Plan, inputs: Inputs, drafted: DraftTree, scores: Scores, text: Text
) -> Distribution:
    """Returns the target's distribution after each node, with transform and sampler applied."""
    if plan.transform is not None:
        assert isinstance(scores, scores_lib.Logits), 'a logits transform needs dense logits'
        logits_BTV = plan.transform(inputs.transform, scores.logits_BTV, drafted, text)
        scores = scores_lib.Logits(logits_BTV)
    seen_BTV = None
    if inputs.sampler.repetition_penalty is not None:
        seen_BTV = _seen(drafted, text, plan.model.vocab_size, plan.method.depth)
    return scores.distribution(inputs.sampler, seen_BTV)


def commit(
    plan: Plan, inputs: Inputs, state: State, drafted: DraftTree, scores: Scores, seen: Seen,
    verdict: Verdict,
) -> State:  # fmt: skip
    """Returns the state after a round; `state` has the memories as the passes left them."""
    emitted_BP = _emitted(drafted, verdict)
    count_B, stop_B, stopped_B = _stop(inputs.stops, state, emitted_BP, verdict)
    after = _append(state.text, emitted_BP, count_B)
    outcome = Outcome(drafted, scores, seen, verdict, after, count_B)
    return State(
        text=after,
        memory=plan.model.keep(state.memory, verdict.path_BP, count_B),
        draft=plan.method.update(inputs.draft, state.draft, outcome),
        stop_B=stop_B,
        limit_B=state.limit_B,
        done_B=state.done_B | stopped_B | (after.length_B >= state.limit_B),
        counts=counts_lib.add(state.counts, ~state.done_B, drafted, verdict),
    )


def _seen(drafted: DraftTree, text: Text, vocab_size: int, depth: int) -> jax.Array:
    """Returns bool `[B, T, V]`: tokens of the text, and of each node's path."""
    b, s = text.token_BS.shape
    live_BS = jnp.arange(s) < text.length_B[:, None]
    token_BS = jnp.where(live_BS, text.token_BS, vocab_size)
    rows = jnp.arange(b)[:, None]
    in_text = jnp.zeros((b, vocab_size), bool).at[rows, token_BS].set(True, mode='drop')
    on_path = tree.ancestors(drafted, depth).astype(jnp.float32)
    tokens = jax.nn.one_hot(drafted.token_BT, vocab_size)
    return in_text[:, None] | (jnp.einsum('bij,bjv->biv', on_path, tokens) > 0)


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
