"""Steps of a model over a memory, for tests of the body, its cache and its presets."""

import jax
import jax.numpy as jnp

from lm.model import cache, contract, stepped
from lm.model.config import Config
from lm.model.contract import Nodes
from lm.model.stepped import Memory


def empty(config: Config, batch: int, rows: int) -> Memory:
    """The empty memory of a batch of texts."""
    return Memory(cache.init(config, batch, rows), None, jnp.zeros(batch, jnp.int32))


def step(weights, config: Config, memory: Memory, nodes: Nodes | jax.Array):
    """Logits after each node, or after each token of a chain, and the memory."""
    model = stepped.model(config)
    if not isinstance(nodes, Nodes):
        nodes = contract.chain(nodes, memory.cache.length_B)
    memory, seen = model.step(weights, memory, nodes)
    return model.head(weights, memory, seen.h_BTD), memory
