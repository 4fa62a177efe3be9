"""Models with tables drawn per text decode as any other, with and without drafts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import model
from decoding.drafts import adapter, chain, early_exit, recursive
from decoding.generate import generate
from decoding.model import LM
from decoding.sample import Sampler, at_position, draw, log_probs
from decoding.verify import target_only_walk
from lm.model import lexinvariant, params, tables, transformer
from lm.model.config import Config, Lexinvariant

V, NEW = 13, 12
PROMPTS = [[1, 2, 3, 1, 2], [5, 5], [7, 4, 7, 4]]
KEYS = jax.random.split(jax.random.key(5), 3)
SAMPLER = Sampler(temperature=jnp.float32(0.7))
KINDS = {
    'gaussian': Lexinvariant('gaussian'),
    'permuted': Lexinvariant('permuted'),
    'partial': Lexinvariant('gaussian', 0.5),
}


def config_of(kind: Lexinvariant | None, layers: int = 2, width: int = 16) -> Config:
    return Config(
        V, width, layers, 2, 1, 8, 2 * width, max_length=64, unroll=layers, tied=True,
        scale_embeddings=True, lexinvariant=kind,
    )  # fmt: skip


def make(kind: Lexinvariant | None, layers: int = 2, width: int = 16) -> LM:
    config = config_of(kind, layers, width)
    return model.transformer(config, params.init(config, jax.random.key(width)))


OWN = config_of(Lexinvariant())
ADAPTER = early_exit.Adapter(
    adapter.model(OWN), adapter.as_params(adapter.init(jax.random.key(1), OWN))
)
DRAFTERS = {
    'chain': lambda target: chain.chain(make(None, 1, 8), 2),
    'beam': lambda target: recursive.beam(make(Lexinvariant(), 1, 8), 2, 2),
    'early exit': lambda target: early_exit.early_exit(target, 1, 3, adapter=ADAPTER),
}


@functools.cache
def plain_text(kind):
    return generate(make(kind), PROMPTS, key=KEYS, max_new_tokens=NEW, sampler=SAMPLER)


@pytest.mark.parametrize('kind', KINDS.values(), ids=KINDS)
def test_a_text_keeps_its_table(kind):
    target, plain = make(kind), plain_text(kind)
    config = config_of(kind)
    drawn = tables.for_texts(target.params['tables'], config, KEYS)
    p = {**target.params, 'tables': drawn}
    forward = jax.jit(transformer.forward, static_argnums=1)
    texts = np.zeros((3, 24), np.int32)
    ends = np.array([len(prompt) for prompt in PROMPTS])
    for row, prompt in zip(texts, PROMPTS):
        row[: len(prompt)] = prompt
    for _ in range(NEW):
        logits = forward(p, config, jnp.asarray(texts))[np.arange(3), ends - 1]
        texts[np.arange(3), ends] = draw(log_probs(SAMPLER, logits), KEYS, jnp.asarray(ends))
        ends += 1
    for row, end, tokens in zip(texts, ends, plain.tokens):
        np.testing.assert_array_equal(row[end - NEW : end], tokens)


@pytest.mark.parametrize('name', DRAFTERS)
def test_drafts_do_not_change_the_text(name):
    kind = KINDS['permuted' if name == 'chain' else 'gaussian']
    target, call = make(kind), {'key': KEYS, 'max_new_tokens': NEW, 'sampler': SAMPLER}
    drafter = DRAFTERS[name](target)
    drafted = generate(target, PROMPTS, drafter=drafter, verifier=target_only_walk, **call)
    for row, other in zip(drafted.tokens, plain_text(kind).tokens, strict=True):
        np.testing.assert_array_equal(row, other)


def test_a_draft_from_the_targets_own_tables_is_accepted():
    """A draft model equal to the target draws the same table from a text's key."""
    target = make(Lexinvariant())
    greedy = Sampler(temperature=jnp.float32(0))
    result = generate(
        target, PROMPTS, key=KEYS, max_new_tokens=NEW, sampler=greedy,
        drafter=chain.chain(target, 3, greedy),
    )  # fmt: skip
    assert result.metrics.rounds == 3 * NEW // 4


def test_without_drawn_rows_a_call_uses_the_models_own_tables():
    target = make(Lexinvariant(probability=0.0))
    learned = model.transformer(config_of(None), target.params)
    call = {'key': KEYS, 'max_new_tokens': 4, 'sampler': SAMPLER}
    first, again, expected = (generate(m, PROMPTS, **call) for m in (target, target, learned))
    for rows in zip(first.tokens, again.tokens, expected.tokens, strict=True):
        assert rows[0].tolist() == rows[1].tolist() == rows[2].tolist()


def test_no_draw_of_a_text_shares_its_key_with_the_table():
    """Otherwise acceptance would be correlated with the table."""
    base = KEYS[:1]
    table = lexinvariant.of_segment(base, lexinvariant._DECODING)
    rows = [jax.random.fold_in(table[0], symbol) for symbol in range(V)]
    own = {tuple(jax.random.key_data(key).tolist()) for key in [table[0], *rows]}
    draws = [at_position(base, jnp.asarray([n]), *tags)[0]
             for n in range(64) for tags in ((), (1,), (2,))]  # fmt: skip
    assert not own & {tuple(jax.random.key_data(key).tolist()) for key in draws}
    assert len(own) == V + 1
