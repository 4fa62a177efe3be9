"""Generation: checks, buckets and results around one jitted loop.

target = decoding.model.transformer(bundle.config, bundle.params, bos=bundle.bos)
result = generate(target, prompts, key=jax.random.key(0), max_new_tokens=100)
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from decoding import arguments, rounds, tree, verify
from decoding import stop as stop_lib
from decoding.drafter import Context, Drafter, Method, Proposal, Text, Verifier
from decoding.model import LM, for_decoding
from decoding.rounds import Inputs, Plan, State
from decoding.sample import Sampler
from decoding.scores import Transform
from decoding.stop import Stops

# (row, tokens): a round's new tokens; all but the last were drafted
Stream = Callable[[int, np.ndarray], None]
FOREVER = np.iinfo(np.int32).max


class Metrics(NamedTuple):
    """Counts and times of a call; rounds and tokens are summed over the rows.

    Attributes:
      tokens: new tokens.
      rounds: target passes, counted for live rows.
      block_efficiency: tokens per target pass.
      memory_bound_speedup: block efficiency / (1 + draft calls x size of a draft pass / size of the
        target): the speed-up if passes took only the time to read weights.
      acceptance_by_depth: of the walks that were offered a child at this depth, the share that
        accepted one; the first entry is depth 1.
      acceptance_by_rank: of the nodes that had a child of this rank, the share that took it.
      prefill_seconds, decode_seconds: wall clock, compilation included.
      compilations: compilations of the loop and the prefill that this call caused.
    """

    tokens: int
    rounds: int
    block_efficiency: float
    memory_bound_speedup: float
    acceptance_by_depth: tuple[float, ...]
    acceptance_by_rank: tuple[float, ...]
    prefill_seconds: float
    decode_seconds: float
    compilations: int


class Generation(NamedTuple):
    """Continuations, without their prompts.

    Attributes:
      tokens: int32 `[T]` for each row, including the token that stopped it.
      ended: why each row ended.
      metrics: see `Metrics`.
      draft: the drafter's final state, for a warm start (`recycling.pool`).
    """

    tokens: list[np.ndarray]
    ended: list[Literal['stop', 'length']]
    metrics: Metrics
    draft: Any


def generate(
    lm: LM,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    key: jax.Array,
    max_new_tokens: int | Sequence[int],
    sampler: Sampler | None = None,
    drafter: Drafter | None = None,
    verifier: Verifier | None = None,
    transform: Transform | None = None,
    stops: Stops | None = None,
    stream: Stream | None = None,
) -> Generation:
    """Continues a batch of prompts; drafts change the speed, not the text's distribution.

    Recompiles for another model, drafter's method, verifier, transform, set of sampler fields in
    use, number of rows, or bucket of the longest prompt or the longest text (`bucket`).

    Args:
      lm: the target.
      prompts: ids of each row, a ragged batch; at least one id per row.
      key: one key, into which each row's index is folded; or one key per row.
      max_new_tokens: one limit, or one per row.
      sampler: how logits become a distribution; by default their softmax. Temperature 0 is greedy.
        A setting is a scalar, or one per row.
      drafter: how to draft; by default `plain`.
      verifier: the rule; by default the exact one that accepts most for the drafter's trees.
      transform: changes the logits before the sampler.
      stops: stop ids and stop strings (`decoding.stop`).
      stream: called after each round with each live row's new tokens.

    Raises:
      ValueError: before anything compiles; names the argument.
    """
    drafter = plain() if drafter is None else drafter
    sampler = Sampler() if sampler is None else sampler
    verifier = verify.default_for(drafter.method.trees) if verifier is None else verifier
    limits = arguments.check(
        lm, prompts, max_new_tokens, sampler, drafter, verifier, stops, transform
    )
    sampler = arguments.per_row(sampler, len(prompts))
    keys = arguments.row_keys(key, len(prompts))
    lm = for_decoding(lm)
    stops = stop_lib.none(lm.model.vocab_size, len(prompts)) if stops is None else stops
    apply, constants = (None, None) if transform is None else transform
    text, prompt_BL = _texts(prompts, limits, keys)
    rows = text.token_BS.shape[1] + drafter.method.nodes
    plan = Plan(lm.model, drafter.method, verifier, rows, apply)
    inputs = Inputs(lm.params, drafter.params, constants, sampler, stops.table)
    compiled = _compilations()
    began = time.perf_counter()
    state = rounds.prefill(plan, inputs, prompt_BL, text, jnp.asarray(limits), stops.start_B)
    jax.block_until_ready(state)
    prefilled = time.perf_counter()
    state = jax.block_until_ready(_run(plan, inputs, state, stream))
    seconds = (prefilled - began, time.perf_counter() - prefilled)
    tokens, ended = _continuations(prompts, state)
    metrics = _metrics(lm, drafter, state, tokens, seconds, _compilations() - compiled)
    return Generation(tokens, ended, metrics, state.draft)


def plain() -> Drafter:
    """Returns the drafter that drafts nothing: one token per target pass."""
    return _PLAIN


def _root_only(params: Any, state: Any, context: Context, /, **extra: Any) -> Proposal:
    text = context.text
    return Proposal(tree.root_only(tree.at(text.token_BS, text.length_B - 1)), None)


def _nothing(*seen: Any, **extra: Any) -> None:
    return None


_PLAIN = Drafter(Method(_nothing, _root_only, _nothing, tree.DraftTree, 1, 0, 1))


def bucket(n: int) -> int:
    """Returns the size to which `n` is padded: 16, 24, 32, 48, 64, 96 and so on."""
    power = 1 << max(n - 1, 1).bit_length()
    return max(16, power * 3 // 4 if n <= power * 3 // 4 else power)


def _texts(prompts, limits, keys) -> tuple[Text, jax.Array]:
    """Returns the texts with room to their limits, and the prompts alone, both padded."""
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    width, size = bucket(int(lengths.max())), bucket(int(limits.max()))
    token_BS = np.zeros((len(prompts), size), np.int32)
    for row, prompt in zip(token_BS, prompts, strict=True):
        row[: len(prompt)] = prompt
    text = Text(jnp.asarray(token_BS), jnp.asarray(lengths), keys)
    return text, jnp.asarray(token_BS[:, :width])


def _run(plan: Plan, inputs: Inputs, state: State, stream: Stream | None) -> State:
    if stream is None:
        return rounds.loop(plan, inputs, state, FOREVER)
    length_B, done_B = jax.device_get((state.text.length_B, state.done_B))
    while not done_B.all():
        state = rounds.loop(plan, inputs, state, 1)
        after_B, done_B, token_BS = jax.device_get(
            (state.text.length_B, state.done_B, state.text.token_BS)
        )
        for row in np.flatnonzero(after_B > length_B):
            stream(int(row), token_BS[row, length_B[row] : after_B[row]])
        length_B = after_B
    return state


def _continuations(prompts, state: State) -> tuple[list[np.ndarray], Any]:
    """Returns each row's new tokens, and why it ended."""
    token_BS, end_B = jax.device_get((state.text.token_BS, state.text.length_B))
    rows = zip(token_BS, prompts, end_B, strict=True)
    stopped_B = jax.device_get(stop_lib.stopped(state.stop_B))
    ended = ['stop' if x else 'length' for x in stopped_B]
    return [row[len(prompt) : end] for row, prompt, end in rows], ended


def _compilations() -> int:
    jitted: list[Any] = [rounds.prefill, rounds.loop]
    return sum(function._cache_size() for function in jitted)


def _metrics(lm: LM, drafter: Drafter, state: State, tokens, seconds, compilations) -> Metrics:
    counts = jax.device_get(state.counts)
    n_rounds = int(counts.rounds_B.sum())
    n_tokens = sum(map(len, tokens))
    efficiency = n_tokens / max(n_rounds, 1)
    draft = drafter.provenance
    share = draft.calls * draft.size / lm.model.size

    def rates(accepted, offered):
        return tuple(float(a / max(o, 1)) for a, o in zip(accepted.sum(0), offered.sum(0)))

    return Metrics(
        n_tokens, n_rounds, efficiency, efficiency / (1 + share),
        rates(counts.accepted_BP, counts.offered_BP)[1:],
        rates(counts.accepted_BA, counts.offered_BA),
        prefill_seconds=seconds[0], decode_seconds=seconds[1], compilations=compilations,
    )  # fmt: skip
