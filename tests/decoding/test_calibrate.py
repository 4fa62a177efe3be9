"""Tree sizes from measured costs, against an exhaustive search."""

import itertools

import jax
import numpy as np
import pytest

from decoding import calibrate
from decoding.calibrate import Curve
from decoding.drafts.template import best_first
from decoding.model import for_decoding, transformer
from lm.model import params
from lm.model.config import Config

RANKS = (0.5, 0.2, 0.1)


def test_expected_tokens_are_those_of_simulated_walks():
    template = best_first(RANKS, 9)
    rate = calibrate.rates(RANKS, (0.6, 0.3))
    generator = np.random.default_rng(0)
    tokens = []
    for _ in range(20_000):
        node, depth, count = 0, 0, 1
        while True:
            depth += 1
            shares = [rate(depth, rank) for rank in range(3)]
            rank = generator.choice(4, p=[*shares, 1 - sum(shares)])
            below = np.flatnonzero((template.parent == node) & (template.rank == rank))
            if not below.size:
                break
            node, count = below[0], count + 1
        tokens.append(count)
    expected = calibrate.expected_tokens(template, rate)
    assert abs(np.mean(tokens) - expected) < 4 * np.std(tokens) / len(tokens) ** 0.5
    assert rate(1, 0) + rate(1, 1) + rate(1, 2) == pytest.approx(0.6)
    assert rate(5, 0) == rate(2, 0)


def test_the_choice_depends_on_what_nodes_cost():
    sizes = (1, 2, 4, 8, 16, 32)
    free = calibrate.best_nodes(Curve(sizes, (1.0,) * 6), RANKS)
    assert len(free.template.parent) == 32 and free.speedup == pytest.approx(free.tokens)
    dear = calibrate.best_nodes(Curve(sizes, tuple(map(float, sizes))), RANKS)
    assert len(dear.template.parent) == 1 and dear.speedup == dear.tokens == 1
    curve = Curve(sizes, (1.0, 1.05, 1.2, 1.6, 2.0, 4.0))
    some = calibrate.best_nodes(curve, RANKS, draft_seconds=0.01)
    assert 1 < len(some.template.parent) < 32
    # a greater cost per level gives a shallower tree
    slow = calibrate.best_nodes(curve, RANKS, draft_seconds=0.5)
    assert slow.template.depth.max() < some.template.depth.max()
    rate = calibrate.rates(RANKS)
    for nodes in range(1, 33):
        template = best_first(RANKS, nodes)
        seconds = curve.at(nodes) + 0.01 * template.depth.max()
        assert calibrate.expected_tokens(template, rate) / seconds <= some.speedup + 1e-9


def test_measured_rates_that_rise_or_vanish_are_mended():
    mended = calibrate.falling((0.3, 0.4, 0.0, 1.0))
    assert all(0 < b <= a < 1 for a, b in itertools.pairwise(mended))


def test_a_curve_is_measured_once_per_machine(tmp_path):
    config = Config(32, 16, 2, 2, 1, 8, 16, max_length=32)
    lm = for_decoding(transformer(config, params.init(config, jax.random.key(0))))
    calls = []

    def find():
        calls.append(1)
        return calibrate.measure(lm, batch=2, rows=16, nodes=(4, 1), repeats=2)

    path = tmp_path / 'curve.json'
    first = calibrate.remembered(path, {'cpu': 'a', 'nodes': (1, 4)}, find)
    assert first.nodes == (1, 4) and min(first.seconds) > 0
    assert calibrate.remembered(path, {'cpu': 'a', 'nodes': (1, 4)}, find) == first
    calibrate.remembered(path, {'cpu': 'b', 'nodes': (1, 4)}, find)
    path.write_text('{')
    calibrate.remembered(path, {'cpu': 'b', 'nodes': (1, 4)}, find)
    assert len(calls) == 3
