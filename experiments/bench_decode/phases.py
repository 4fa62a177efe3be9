"""Breaks a decoding round down into phases, each a separately jitted function."""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decoding import model as model_lib
from decoding import rounds, stop, verify
from decoding.drafter import Context, Text
from decoding.drafts import recursive
from decoding.model import LM, for_decoding
from decoding.rounds import Inputs, Plan
from decoding.sample import Sampler
from experiments.bench_decode.config import Config
from lm.model import params as params_lib


def measure(config: Config, model: LM) -> dict[str, float]:
    """Returns the median seconds of each phase, of their sum, a whole round, and the host."""
    draft_params = params_lib.init(config.draft, jax.random.key(1))
    draft = for_decoding(model_lib.transformer(config.draft, draft_params))
    drafter = recursive.branching(draft, config.factors)
    method = drafter.method
    verifier = verify.default_for(method.trees)
    size = config.prompt_tokens + config.new_tokens
    plan = Plan(model.model, method, verifier, size + method.nodes)
    stops = stop.none(config.model.vocab_size, 1)
    inputs = Inputs(model.params, drafter.params, None, Sampler(), stops.table)

    @jax.jit
    def propose(inputs, state):
        context = Context(state.text, inputs.params, state.memory)
        return method.propose(inputs.draft, state.draft, context)

    @functools.partial(jax.jit, donate_argnums=3)
    def target_pass(inputs, proposal, text, memory):
        return rounds.target_pass(
            plan, inputs.params, proposal, Context(text, inputs.params, memory)
        )

    @jax.jit
    def judge(sampler, tree, scores, text):
        # not all inputs: the host would spend longer on passing the weights than on the phase
        inputs = Inputs(None, None, None, sampler, stops.table)
        distribution = rounds.distribution(plan, inputs, tree, scores, text)
        return verifier.verify(tree, distribution, text, method.depth, method.branching)

    @functools.partial(jax.jit, donate_argnums=1)
    def commit(weights, state, *found):
        inputs = Inputs(None, weights, None, Sampler(), stops.table)
        return rounds.commit(plan, inputs, state, *found)

    seconds: dict[str, list[float]] = {}

    def timed(name: str, function: Any, *arguments: Any) -> Any:
        begin = time.perf_counter()
        result = jax.block_until_ready(function(*arguments))
        seconds.setdefault(name, []).append(time.perf_counter() - begin)
        return result

    for _ in range(config.repeats + 1):
        state = streamed(plan, inputs, begin(plan, inputs, config), seconds)
        proposal = timed('draft', propose, inputs, state)
        scores, seen, memory = timed(
            'target pass', target_pass, inputs, proposal, state.text, state.memory
        )
        verdict = timed('verify', judge, inputs.sampler, proposal.tree, scores, state.text)
        state = dataclasses.replace(state, memory=memory, draft=proposal.state)
        timed('commit', commit, inputs.draft, state, proposal.tree, scores, seen, verdict)
    found = {name: float(np.median(times[1:])) for name, times in seconds.items()}
    whole, host = found.pop('round'), found.pop('host')
    return {**found, 'sum': sum(found.values()), 'round': whole, 'host': host}


def streamed(
    plan: Plan, inputs: Inputs, state: rounds.State, seconds: dict[str, list[float]]
) -> rounds.State:
    """Runs a round as `generate` does when streaming; records its time and the host's part.

    The host's part is the time until the round is dispatched, and from its end until its tokens
    have been read.
    """
    times = [time.perf_counter()]
    state = rounds.loop(plan, inputs, state, 1)
    times.append(time.perf_counter())
    jax.block_until_ready(state)
    times.append(time.perf_counter())
    jax.device_get((state.text.length_B, state.done_B, state.text.token_BS))
    times.append(time.perf_counter())
    seconds.setdefault('round', []).append(times[3] - times[0])
    seconds.setdefault('host', []).append(times[1] - times[0] + times[3] - times[2])
    return state


def begin(plan: Plan, inputs: Inputs, config: Config) -> rounds.State:
    """Returns the state after prefill of a one-row prompt."""
    size = config.prompt_tokens + config.new_tokens
    token_BS = jnp.zeros((1, size), jnp.int32)
    length_B = jnp.full(1, config.prompt_tokens, jnp.int32)
    text = Text(token_BS, length_B, jax.random.split(jax.random.key(2), 1))
    prompt_BL = token_BS[:, : config.prompt_tokens]
    limit_B, stop_B = jnp.full(1, size), jnp.ones(1, jnp.int32)
    state = rounds.prefill(plan, inputs, prompt_BL, text, limit_B, stop_B)
    return jax.block_until_ready(state)  # otherwise the first round's time would include prefill
