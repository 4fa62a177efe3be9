"""Breaks a decoding round down into phases, each a separately jitted function."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decoding import rounds, stop, verify
from decoding.drafter import Model, Text
from decoding.drafts import recursive
from decoding.generate import ready
from decoding.rounds import Plan
from decoding.sample import Sampler
from experiments.bench_decode.config import Config
from lm.model import params as params_lib


def measure(config: Config, model: Model) -> dict[str, float]:
    """Returns the median seconds of each phase, of their sum, a whole round, and the host."""
    draft = Model(config.draft, params_lib.init(config.draft, jax.random.key(1)))
    drafter = recursive.branching(ready(draft), config.factors)
    verifier = verify.default_for(drafter.trees)
    size = config.prompt_tokens + config.new_tokens
    static = drafter._replace(params=None, model=None)
    plan = Plan(config.model, static, verifier, None, size + drafter.nodes)
    sampler, stops = Sampler(), stop.none(config.model.vocab_size, 1)
    weights: Any = drafter.params

    def propose(params, weights, state):
        tree, kept, _ = drafter.propose(weights, state.draft, state.text, params, state.cache)
        return tree, kept

    def judge(sampler, tree, logits_BTV, text):
        logprob_BTV = rounds.law(plan, sampler, tree, logits_BTV, text)
        return verifier.verify(tree, logprob_BTV, text, drafter.depth, drafter.branching)

    def target_pass(params, tree, text, cache):
        return rounds.target_pass(plan, params, tree, None, text, cache)

    def commit(weights, stops, state, *found):
        return rounds.commit(plan, weights, stops, state, *found)

    propose, judge = jax.jit(propose), jax.jit(judge)
    target_pass, commit = jax.jit(target_pass, donate_argnums=3), jax.jit(commit, donate_argnums=2)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, function: Any, *arguments: Any) -> Any:
        begin = time.perf_counter()
        result = jax.block_until_ready(function(*arguments))
        seconds.setdefault(name, []).append(time.perf_counter() - begin)
        return result

    for _ in range(config.repeats + 1):
        arguments = plan, model.params, weights, sampler, stops.table
        state = streamed(arguments, begin(plan, model, weights, config), seconds)
        tree, kept = timed('draft', propose, model.params, weights, state)
        logits_BTV, cache = timed(
            'target pass', target_pass, model.params, tree, state.text, state.cache
        )
        verdict = timed('verify', judge, sampler, tree, logits_BTV, state.text)
        state = dataclasses.replace(state, cache=cache, draft=kept)
        timed('commit', commit, weights, stops.table, state, tree, logits_BTV, verdict)
    found = {name: float(np.median(times[1:])) for name, times in seconds.items()}
    whole, host = found.pop('round'), found.pop('host')
    return {**found, 'sum': sum(found.values()), 'round': whole, 'host': host}


def streamed(arguments: Any, state: rounds.State, seconds: dict[str, list[float]]) -> rounds.State:
    """Runs a round as `generate` does when streaming; records its time and the host's part.

    The host's part is the time until the round is dispatched, and from its end until its tokens
    have been read.
    """
    times = [time.perf_counter()]
    state = rounds.loop(*arguments, state, 1)
    times.append(time.perf_counter())
    jax.block_until_ready(state)
    times.append(time.perf_counter())
    jax.device_get((state.text.length_B, state.done_B, state.text.token_BS))
    times.append(time.perf_counter())
    seconds.setdefault('round', []).append(times[3] - times[0])
    seconds.setdefault('host', []).append(times[1] - times[0] + times[3] - times[2])
    return state


def begin(plan: Plan, model: Model, weights: Any, config: Config) -> rounds.State:
    """Returns the state after prefill of a one-row prompt."""
    size = config.prompt_tokens + config.new_tokens
    token_BS = jnp.zeros((1, size), jnp.int32)
    length_B = jnp.full(1, config.prompt_tokens, jnp.int32)
    text = Text(token_BS, length_B, jax.random.split(jax.random.key(2), 1))
    prompt_BL = token_BS[:, : config.prompt_tokens]
    state = rounds.prefill(
        plan, model.params, weights, prompt_BL, text, jnp.full(1, size), jnp.ones(1, jnp.int32)
    )
    return jax.block_until_ready(state)  # otherwise the first round's time would include prefill
