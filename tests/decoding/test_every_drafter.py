"""Every drafter under every exact rule gives the text, or the distribution, of plain sampling.

One compiled program serves all tests of a pair: temperatures, sharpness and stops are data.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from decoding import stop, verify
from decoding.generate import generate
from decoding.sample import Sampler, log_probs
from lm.model import transformer
from tests.decoding.subjects import (
    CONFIG,
    DRAFTERS,
    LENGTH,
    PAIR_IDS,
    PAIRS,
    TARGET,
    V,
    scaled,
    scaled_draft,
)  # fmt: skip

LETTERS = [bytes([97 + i]) for i in range(V)]
PROMPTS = [[1, 2, 3, 1, 2], [4], [2, 2, 2, 2, 2, 2, 2], [3, 4]] * 2
KEYS = jax.random.split(jax.random.key(7), 8)
NEW = [LENGTH - len(prompt) for prompt in PROMPTS]  # to the end of the context
NEVER = stop.Rule(strings=(b'zz',))  # letters that no token has, in an automaton of four states


def run(drafter=None, rule=verify.target_only_walk, temperature=1.0, stops=None, **settings):
    """Eight rows, always through one compiled program per drafter and rule."""
    stops = stop.build([NEVER] * 8, LETTERS) if stops is None else stops
    settings = {'max_new_tokens': NEW, **settings}
    return generate(
        TARGET, PROMPTS, key=KEYS, sampler=Sampler(jnp.float32(temperature)), drafter=drafter,
        verifier=rule, stops=stops, **settings,
    )  # fmt: skip


plain = functools.cache(lambda temperature=1.0: run(temperature=temperature))


def equal(actual, expected):
    """Token for token."""
    for row, other in zip(actual.tokens, expected.tokens, strict=True):
        np.testing.assert_array_equal(row, other)


@pytest.mark.parametrize('name', DRAFTERS)
def test_target_only_walk_gives_the_tokens_of_plain_sampling(name):
    drafter = DRAFTERS[name]
    for i, temperature in enumerate((1.0, 0.3, 0.0)):
        result = run(drafter, temperature=temperature)
        equal(result, plain(temperature))
        assert result.metrics.compilations == (0 if i else 2)  # a temperature is data
        assert result.metrics.tokens == sum(NEW)
    # a limit per row: the last round of a row may accept more than there is room for
    new = [3, 1, 16, 7, 5, 2, 9, 4]
    for tokens, count, whole in zip(
        run(drafter, max_new_tokens=new).tokens, new, plain().tokens, strict=True
    ):
        np.testing.assert_array_equal(tokens, whole[:count])
    # a stop inside an accepted path
    pairs = [LETTERS[t[1]] + LETTERS[t[2]] for t in plain().tokens]
    stopped = run(drafter, stops=stop.build([stop.Rule(strings=(p,)) for p in pairs], LETTERS))
    for tokens, pair, whole in zip(stopped.tokens, pairs, plain().tokens, strict=True):
        written = b''.join(LETTERS[i] for i in whole)
        np.testing.assert_array_equal(tokens, whole[: written.index(pair) + 2])
    assert stopped.ended == ['stop'] * 8


@pytest.mark.parametrize('name', DRAFTERS)
def test_greedy_text_is_that_of_plain_decoding_under_other_rules(name):
    drafter = DRAFTERS[name]
    rule = verify.default_for(drafter.method.trees)
    rule = verify.greedy_walk if rule is verify.target_only_walk else rule
    equal(run(drafter, rule, temperature=0.0), plain(0.0))


@pytest.mark.parametrize(('name', 'rule'), PAIRS, ids=PAIR_IDS)
def test_the_first_two_tokens_follow_the_distribution(name, rule):
    rows, drafter = 4096, DRAFTERS[name]
    keys = jax.random.split(jax.random.key(11), rows)
    # as they are; both nearly uniform, and so nearly equal; uniform; nearly one-hot; greedy
    for factor, of_draft, temperature in (
        (1.0, 1.0, 1.3), (0.02, 0.01, 1.0), (0.0, 1.0, 1.0), (6.0, 1.0, 1.0), (1.0, 1.0, 0.0)
    ):  # fmt: skip
        sampler = Sampler(temperature=jnp.float32(temperature))
        result = generate(
            scaled(TARGET, factor), [[1, 3]] * rows, key=keys, max_new_tokens=2, sampler=sampler,
            drafter=scaled_draft(drafter, of_draft), verifier=rule,
        )  # fmt: skip
        pairs = np.stack(result.tokens)
        counts = np.zeros((V, V))
        np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
        expected = rows * two_tokens(factor, temperature)
        likely = expected > 1e-3
        assert counts[~likely].sum() <= 3
        assert chi_square(counts[likely], expected[likely]) > 1e-4


def chi_square(counts, expected) -> float:
    """The p-value; cells of fewer than five expected counts are pooled."""
    few = expected < 5
    merged = [counts[few].sum()] if few.any() else []
    sums = [expected[few].sum()] if few.any() else []
    observed = np.asarray([*counts[~few], *merged])
    wanted = np.asarray([*expected[~few], *sums])
    if len(wanted) < 2:
        return 1.0 if observed.sum() == counts.sum() else 0.0
    return scipy.stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue


def two_tokens(factor: float, temperature: float) -> np.ndarray:
    """The probability of each pair of tokens after the prompt, by full forward passes."""
    after = jnp.asarray([[1, 3, token] for token in range(V)])
    logits = transformer.forward(scaled(TARGET, factor).params, CONFIG, after)
    p = np.exp(np.asarray(log_probs(Sampler(temperature=temperature), logits), np.float64))
    return p[0, 1][:, None] * p[:, 2]
