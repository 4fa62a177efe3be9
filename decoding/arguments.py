"""Checks of the arguments of `generate`, before anything compiles."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decoding import sample, verify
from decoding.drafter import Drafter, Verifier
from decoding.model import LM
from decoding.sample import Sampler
from decoding.scores import Transform
from decoding.stop import Stops
from lm.model.contract import Model


def check(
    lm: LM,
    prompts: Sequence[Sequence[int] | np.ndarray],
    max_new_tokens: int | Sequence[int],
    sampler: Sampler,
    drafter: Drafter,
    verifier: Verifier,
    stops: Stops | None,
    transform: Transform | None = None,
) -> np.ndarray:
    """Returns the length at which each row ends, int32 `[B]`; arguments are those of `generate`.

    Raises:
      ValueError: an argument is invalid; names it.
      TypeError: the verifier is not exact for the drafter's trees.
    """
    model, method = lm.model, drafter.method
    if not len(prompts):
        raise ValueError('prompts: none given')
    new = np.asarray(max_new_tokens)
    if new.shape not in ((), (len(prompts),)) or new.dtype.kind not in 'iu':
        raise ValueError(
            f'max_new_tokens: {max_new_tokens}; expected an integer, or one for each of '
            f'{len(prompts)} rows'
        )
    new = np.broadcast_to(new, (len(prompts),))
    if new.min() < 1:
        raise ValueError(f'max_new_tokens: {new.min()}; expected at least 1')
    for i, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if not ids.size:
            raise ValueError(f'prompt {i} is empty; start it with the BOS id')
        if ids.ndim != 1 or ids.dtype.kind not in 'iu':
            raise ValueError(
                f'prompt {i}: {ids.dtype} of shape {ids.shape}; expected a list of ids'
            )
        bad = ids[(ids < 0) | (ids >= model.vocab_size)]
        if bad.size:
            raise ValueError(f'prompt {i}: id {bad[0]} is not in [0, {model.vocab_size})')
        if ids.size + new[i] > model.max_length:
            raise ValueError(
                f'prompt {i} has {ids.size} tokens, and {new[i]} more do not fit: the model '
                f'takes at most {model.max_length} (max_length)'
            )
    sample.check(sampler)
    verify.check_pairing(method, verifier, sampler)
    _check_dense(model, sampler, verifier, transform)
    _check_draft_model(lm, drafter)
    if method.nodes > model.max_length:
        raise ValueError(
            f'drafter: a tree of {method.nodes} nodes; max_length is {model.max_length}'
        )
    if stops is not None and stops.table.shape[1] != model.vocab_size:
        raise ValueError(
            f'stops: made for {stops.table.shape[1]} symbols; the model has {model.vocab_size}'
        )
    if stops is not None and stops.start_B.shape[0] != len(prompts):
        raise ValueError(f'stops: for {stops.start_B.shape[0]} rows; there are {len(prompts)}')
    return np.asarray([len(p) for p in prompts], np.int32) + new.astype(np.int32)


def _check_dense(
    model: Model, sampler: Sampler, verifier: Verifier, transform: Transform | None
) -> None:
    if model.dense:
        return
    if transform is not None:
        raise ValueError('transform: needs the logits of every token; this model only searches')
    if verifier.dense:
        raise ValueError(
            f'{verifier.name} needs the probability of every token; this model only searches: '
            f'use {verify.target_only_walk.name}'
        )
    for field in dataclasses.fields(sampler):
        if field.name != 'temperature' and getattr(sampler, field.name) is not None:
            raise ValueError(
                f'{field.name}: needs the logits of every token; this model only searches: only '
                'the temperature can be set'
            )


def _check_draft_model(target: LM, drafter: Drafter) -> None:
    draft = drafter.provenance.model
    if draft is None:
        return
    if drafter.method.shared_layers and draft.model is not target.model:
        raise ValueError(
            'drafter: an early exit of another model; it must run the layers of the target'
        )
    if not draft.model.dense:
        raise ValueError(
            'drafter: draws from the logits of every token, and its draft model is searched'
        )
    if draft.tokenizer and target.tokenizer and draft.tokenizer != target.tokenizer:
        raise ValueError(
            f'draft and target have different tokenizers ({draft.tokenizer[:12]} and '
            f'{target.tokenizer[:12]}): an id stands for different bytes in each'
        )
    if draft.model.vocab_size != target.model.vocab_size:
        raise ValueError(
            f'draft and target have different vocabularies: {draft.model.vocab_size} and '
            f'{target.model.vocab_size} symbols; they must share a tokenizer'
        )


def per_row(sampler: Sampler, rows: int) -> Sampler:
    """Returns the sampler with settings `[B]` as `[B, 1]`, to broadcast over a row's nodes."""

    def column(setting):
        shape = np.shape(setting)
        if shape not in ((), (rows,), (rows, 1)):
            raise ValueError(f'sampler: a setting of shape {shape}; expected () or ({rows},)')
        return jnp.asarray(setting)[:, None] if shape == (rows,) else setting

    return jax.tree.map(column, sampler)


def row_keys(key: jax.Array, rows: int) -> jax.Array:
    """Returns a key for each row; raises ValueError if `key` is not a typed JAX key."""
    dtype: Any = getattr(key, 'dtype', None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise ValueError(f'key: {type(key).__name__}; expected one of jax.random.key(seed)')
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    if key.shape != (rows,):
        raise ValueError(f'key: of shape {key.shape}; expected one key, or one for each of {rows}')
    return key
