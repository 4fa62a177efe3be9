"""Shared by tests of drafters: small models, texts, and the invariants of every tree."""

import jax
import jax.numpy as jnp
import numpy as np

from decoding import model
from decoding.drafter import Context, Prompt, Text
from decoding.model import LM
from decoding.tree import WithoutReplacement
from lm.model import params
from lm.model.config import Config


def tiny(config: Config, sharpness: float, bos: int | None = None) -> LM:
    """A random model; a greater sharpness moves its distributions away from uniform."""
    weights = params.init(config, jax.random.key(0))
    weights['tables']['output_VD'] *= sharpness
    return model.transformer(config, weights, bos=bos)


def texts(rows: list[list[int]], seeds: list[int], length: int) -> Text:
    """Texts in a buffer of some length, with a key for each."""
    # ids after the end are out of range, so that reading them is noticed
    token_BS = np.full((len(rows), length), 1 << 20, np.int32)
    for row, ids in zip(token_BS, rows, strict=True):
        row[: len(ids)] = ids
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    return Text(jnp.asarray(token_BS), jnp.asarray([len(ids) for ids in rows]), keys)


def prompt_of(text: Text, rows: int) -> Prompt:
    """The prompt of a drafter that never reads the target."""
    return Prompt(text.token_BS, text, rows, None, None, None)  # type: ignore[arg-type]


def context_of(text: Text) -> Context:
    """The context of such a drafter."""
    return Context(text, None, None)


def path_of(parent_T, node: int) -> list[int]:
    """The nodes from below the root to a node."""
    path = []
    while node > 0:
        path.append(node)
        node = parent_T[node]
    return path[::-1]


def check_tree(tree, depth: int, branching: int) -> None:
    """Checks the invariants of every tree of `drafts`, row by row."""
    fields = tree.token_BT, tree.parent_BT, tree.depth_BT, tree.valid_BT, tree.logprob_BTV
    for token, parent, level, valid, logprob in zip(*fields, strict=True):
        assert parent[0] == -1 and valid[0] and level[0] == 0 and level.max() <= depth
        assert (parent[1:] >= 0).all() and (parent < np.arange(len(parent))).all()
        assert not np.isnan(logprob).any()
        alive = np.flatnonzero(valid)[1:]
        assert valid[parent[alive]].all() and (level[alive] == level[parent[alive]] + 1).all()
        assert (logprob[parent[alive], token[alive]] > -np.inf).all()
        assert (np.diff(level[alive]) >= 0).all()
        for node in np.flatnonzero(valid):
            children = alive[parent[alive] == node]
            assert len(children) <= branching
            if isinstance(tree, WithoutReplacement):
                assert (np.diff(children) == 1).all()
                assert len(set(token[children])) == len(children)
