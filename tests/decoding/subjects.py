"""Small models and every drafter, as parameters of the tests that all drafters must pass."""

import jax
import jax.numpy as jnp

from decoding import model, verify
from decoding.drafter import Drafter, Verifier
from decoding.drafts import (
    adapter,
    chain,
    dynamic,
    early_exit,
    iid,
    lookup,
    recursive,
    recycling,
    template,
)
from decoding.model import LM
from lm.model import params
from lm.model.config import Config

V, LENGTH = 5, 24


def config_of(layers: int, width: int) -> Config:
    """A shape small enough that thousands of rows decode at once."""
    return Config(V, width, layers, 2, 1, 8, 2 * width, max_length=LENGTH)


CONFIG, SMALL = config_of(2, 8), config_of(1, 8)


def lm_of(config: Config, seed: int, sharpness: float) -> LM:
    """A random model; a greater sharpness moves its distributions away from uniform."""
    weights = params.init(config, jax.random.key(seed))
    weights['tables']['output_VD'] *= sharpness * config.d_model**0.5
    return model.for_decoding(model.transformer(config, weights))


TARGET, DRAFT = lm_of(CONFIG, 3, 0.5), lm_of(SMALL, 6, 0.5)


def trained_adapter() -> early_exit.Adapter:
    """An adapter that adds something, as a new one does not."""
    weights = adapter.init(jax.random.key(4), CONFIG)
    wo_NHCD = weights['layers']['wo_NHCD']
    weights['layers']['wo_NHCD'] = jax.random.normal(jax.random.key(5), wo_NHCD.shape)
    return early_exit.Adapter(adapter.model(CONFIG), adapter.as_params(weights))


SHAPE = template.best_first([0.5, 0.3, 0.1], 6)
DRAFTERS: dict[str, Drafter] = {
    'chain': chain.chain(DRAFT, 2),
    'iid': iid.iid(DRAFT, 3, 2),
    'branching': recursive.branching(DRAFT, (2, 2)),
    'beam': recursive.beam(DRAFT, 3, 2),
    'dynamic': dynamic.dynamic(DRAFT, 6, 2),
    'lookup': lookup.lookup(nodes=6, length=3, branches=2),
    'recycling': recycling.recycling(V, template=SHAPE, ranks=3),
    'early_exit': early_exit.early_exit(TARGET, 1, 2),
    'early_exit_adapter': early_exit.early_exit(TARGET, 1, 2, adapter=trained_adapter()),
}
RULES = (
    verify.target_only_walk, verify.recursive_rejection, verify.speculative_sampling, verify.k_seq
)  # fmt: skip


def permitted(drafter: Drafter) -> list[Verifier]:
    """The rules that are exact for a drafter's trees at any temperature."""
    exact = [rule for rule in RULES if issubclass(drafter.method.trees, rule.trees)]
    alone = drafter.method.branching == 1
    return [rule for rule in exact if rule is not verify.speculative_sampling or alone]


PAIRS = [(name, rule) for name, drafter in DRAFTERS.items() for rule in permitted(drafter)]
PAIR_IDS = [f'{name}-{rule.name.replace(" ", "_")}' for name, rule in PAIRS]


def scaled(lm: LM, factor: float) -> LM:
    """The model with its logits multiplied; 0 makes it uniform. Nothing recompiles."""
    return lm._replace(params=_scaled(lm.params, factor))


def scaled_draft(drafter: Drafter, factor: float) -> Drafter:
    """The drafter with the logits of its draft model multiplied, if it has one."""
    weights = drafter.params
    if not hasattr(weights, 'params'):
        return drafter
    return drafter._replace(params=weights._replace(params=_scaled(weights.params, factor)))


def _scaled(weights, factor: float):
    tables = weights['tables']
    output = jax.tree.map(lambda x: x * jnp.float32(factor), tables['output_VD'])
    return {**weights, 'tables': {**tables, 'output_VD': output}}
