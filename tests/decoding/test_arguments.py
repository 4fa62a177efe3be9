"""Invalid arguments are refused before anything compiles; the models here have no weights."""

import jax
import jax.numpy as jnp
import pytest

from decoding import model, searched, stop, verify
from decoding.drafts import chain, early_exit, lookup
from decoding.generate import generate, plain
from decoding.sample import Sampler
from lm.model.config import Config

V = 17
TARGET = model.transformer(Config(V, 16, 3, 2, 1, 8, 32, max_length=256), {})
DEEPER = model.transformer(Config(V, 16, 4, 2, 1, 8, 32, max_length=256), {})
DRAFT = model.transformer(Config(V, 8, 1, 1, 1, 8, 8), {})
SEARCHED = searched.transformer(
    Config(V, 8, 1, 1, 1, 8, 8), {'tables': {'output_VD': jnp.zeros((V, 8))}}
)
LARGE = plain()._replace(method=plain().method._replace(nodes=300))


def test_bad_arguments_are_refused_before_anything_compiles():
    key = jax.random.key(0)
    other = model.transformer(Config(V + 1, 8, 1, 1, 1, 8, 8), {}, 'abc')
    cases = [
        ('none given', {'prompts': []}),
        ('prompt 1 is empty', {'prompts': [[1], []]}),
        ('id 17 is not in', {'prompts': [[17]]}),
        ('do not fit', {'prompts': [[1] * 250]}),
        ('max_new_tokens', {'max_new_tokens': 0}),
        ('temperature', {'sampler': Sampler(temperature=-1.0)}),
        ('vocabularies', {'drafter': chain.chain(other, 2)}),
        ('tree of', {'drafter': LARGE}),
        ('expected one key', {'key': jax.random.split(key, 3)}),
        ('for 3 rows', {'stops': stop.none(V, 3)}),
        ('made for 9', {'stops': stop.none(9, 1)}),
        ('max_new_tokens', {'max_new_tokens': 2.7}),
        ('max_new_tokens', {'max_new_tokens': [1, 2]}),
        ('jax.random.key', {'key': jnp.zeros(2, jnp.uint32)}),
        ('jax.random.key', {'key': 0}),
        ('a setting of shape', {'sampler': Sampler(temperature=jnp.ones(3))}),
        ('of another model', {'drafter': early_exit.early_exit(DEEPER, 1, 3)}),
        ('draft model is searched', {'drafter': chain.chain(SEARCHED, 2)}),
    ]
    for message, changed in cases:
        arguments = {'prompts': [[1]], 'key': key, 'max_new_tokens': 10, **changed}
        with pytest.raises(ValueError, match=message):
            generate(TARGET, arguments.pop('prompts'), **arguments)
    strangers = chain.chain(DRAFT._replace(tokenizer='abc'), 2)
    with pytest.raises(ValueError, match='tokenizers'):
        generate(TARGET._replace(tokenizer='xyz'), [[1]], key=key, max_new_tokens=1,
                 drafter=strangers)  # fmt: skip
    with pytest.raises(TypeError, match='exact for'):
        generate(TARGET, [[1]], key=key, max_new_tokens=1,
                 drafter=lookup.lookup(nodes=8, length=4, branches=2),
                 verifier=verify.recursive_rejection)  # fmt: skip
