"""Drafting layers run once, and leave the same memory as a full pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from decoding import model, sample, tree
from decoding.drafter import Context, Outcome, Prompt, Text, Verdict
from decoding.drafts import adapter as adapter_lib
from decoding.drafts.early_exit import Adapter, early_exit
from decoding.sample import Sampler
from decoding.tree import WithoutReplacement
from lm.kernels.mask import pack_bits
from lm.model import params as params_lib
from lm.model import transformer
from lm.model.config import Config
from lm.model.contract import Nodes, chain

CONFIG = Config(
    23, 16, 3, 4, 2, 8, 24, max_length=64, activation='gelu_tanh', unit_offset=True,
    post_norm=True, qk_norm=True, logit_softcap=10.0, scale_embeddings=True, window=5,
    local_rope_theta=500.0, window_pattern=(True, False),
)  # fmt: skip
E, DRAFT, ROWS = 2, 3, 24
LENGTHS = [4, 7]


def shaken(weights, seed: int):
    """Moves every leaf: norms and zeros start at constants, which would hide a bug."""
    leaves, structure = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


PARAMS = shaken(params_lib.init(CONFIG, jax.random.key(0)), 1)
TARGET = model.transformer(CONFIG, PARAMS, bos=0)
ADAPTER = shaken(adapter_lib.init(jax.random.key(2), CONFIG), 3)


@functools.cache
def drafter(adapted: bool):
    sampler = Sampler(temperature=0.7, top_k=9, repetition_penalty=1.5)
    adapter = Adapter(adapter_lib.model(CONFIG), adapter_lib.as_params(ADAPTER))
    return early_exit(TARGET, E, DRAFT, sampler, adapter if adapted else None)


@functools.cache
def compiled(adapted: bool):
    """Returns the drafter's functions, and its parameters."""
    made = drafter(adapted)

    def init(weights, prompt_BL, text):
        ask = made.method.ask
        memory, seen = TARGET.model.start(
            PARAMS, chain(prompt_BL), text.length_B - 1, ROWS, text.key_B, ask=ask
        )
        prompt = Prompt(prompt_BL, text, ROWS, PARAMS, memory, seen)
        return memory, made.method.init(weights, prompt)

    def propose(weights, own, text, memory):
        return made.method.propose(weights, own, Context(text, PARAMS, memory))

    return jax.jit(init), jax.jit(propose), jax.jit(made.method.update), made.params


def start(adapted: bool):
    """Returns two texts, the target's memory of all but their last tokens, and the drafter's."""
    token_BS = jax.random.randint(jax.random.key(4), (2, ROWS - DRAFT - 1), 1, 23)
    text = Text(token_BS, jnp.asarray(LENGTHS, jnp.int32), jax.random.split(jax.random.key(5), 2))
    init, _, _, weights = compiled(adapted)
    return text, *init(weights, token_BS[:, : max(LENGTHS)], text)


@functools.partial(jax.jit, static_argnums=1)
def read_out(token_BL: jax.Array, adapted: bool) -> jax.Array:
    """Returns the draft's log-probabilities `[B, L, V]` after each token, without any memory."""
    shallow = dataclasses.replace(CONFIG, n_layers=E)
    body = {**PARAMS['body'], 'layers': jax.tree.map(lambda x: x[:E], PARAMS['body']['layers'])}
    nodes = chain(token_BL)
    seen = transformer.read({**PARAMS, 'body': body}, shallow, nodes)
    if adapted:
        seen = transformer.read(
            adapter_lib.as_params(ADAPTER), adapter_lib.one_layer(CONFIG),
            nodes._replace(x_BTD=seen.x_BTD), mlp=None,
        )  # fmt: skip
    logits_BLV = transformer.head(PARAMS, CONFIG, seen.h_BTD).at[..., 0].set(-jnp.inf)
    return sample.log_probs(Sampler(temperature=0.7, top_k=9), logits_BLV)


@jax.jit
def both_passes(drafted, partial, text, memory):
    """Returns logits and memory of the layers above, and those of a full pass."""
    positions_BT = (text.length_B - 1)[:, None] + drafted.depth_BT
    nodes = Nodes(drafted.token_BT, positions_BT, pack_bits(tree.ancestors(drafted, DRAFT)))
    step, head = TARGET.model.step, TARGET.model.head
    full = step(PARAMS, memory, nodes)
    deep = step(PARAMS, partial.memory, nodes._replace(x_BTD=partial.x_BTD, start_layer=E))
    return [(head(PARAMS, x.memory, x.seen.h_BTD), x.memory.cache) for x in (deep, full)]


@jax.jit
def redraw(drafted, text):
    """Returns the tokens that the stored probabilities and the text's key give, `[B, DRAFT]`."""
    keys = [sample.at_position(text.key_B, text.length_B - 1, 2, d) for d in range(DRAFT)]
    noise = jnp.stack([sample.gumbel(key_B, (23,)) for key_B in keys], axis=1)
    return jnp.argmax(drafted.logprob_BTV[:, :DRAFT] + noise, axis=-1)


def after(text: Text, drafted, accepted: list[int]) -> Text:
    """Returns the texts with the chain's first nodes, and a token that was not drafted."""
    token_BS, length_B = np.array(text.token_BS), np.array(text.length_B)
    for row, n in enumerate(accepted):
        end = length_B[row] + n
        token_BS[row, length_B[row] : end] = drafted.token_BT[row, 1 : n + 1]
        token_BS[row, end] = 20
        length_B[row] = end + 1
    return Text(jnp.asarray(token_BS), jnp.asarray(length_B), text.key_B)


@pytest.mark.parametrize('adapted', [False, True], ids=['bare', 'adapter'])
def test_shallow_then_deep_equals_the_full_pass(adapted):
    _, propose, _, weights = compiled(adapted)
    text, memory, own = start(adapted)
    drafted, _, partial = propose(weights, own, text, memory)
    (logits, deep), (expected, full) = both_passes(drafted, partial, text, memory)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(deep.length_B, full.length_B)
    np.testing.assert_array_equal(deep.position_NBKS, full.position_NBKS)
    for name in ('k_NBKSC', 'v_NBKSC'):
        caches = partial.memory.cache, deep, full
        shallow, got, rows = (np.asarray(getattr(x, name)) for x in caches)
        # the drafting layers' rows are there before the deep pass, and it leaves them alone
        np.testing.assert_array_equal(shallow[:E], got[:E])
        for row, n in enumerate(LENGTHS):
            used = (slice(None), row, slice(None), slice(0, n + DRAFT))
            np.testing.assert_allclose(got[used], rows[used], atol=1e-5)


@pytest.mark.parametrize('adapted', [False, True], ids=['bare', 'adapter'])
def test_chains_are_drawn_from_the_stored_distribution_round_after_round(adapted):
    _, propose, update, weights = compiled(adapted)
    text, memory, own = start(adapted)
    for accepted in ([DRAFT, 1], [0, DRAFT]):
        drafted, own, partial = propose(weights, own, text, memory)
        assert isinstance(drafted, WithoutReplacement)
        assert drafted.parent_BT.tolist() == [[-1, 0, 1, 2]] * 2 and drafted.valid_BT.all()
        np.testing.assert_array_equal(redraw(drafted, text), drafted.token_BT[:, 1:])
        stored = np.asarray(drafted.logprob_BTV)[:, :DRAFT]
        expected = np.asarray(read_out(after(text, drafted, [DRAFT] * 2).token_BS, adapted))
        for row, n in enumerate(np.asarray(text.length_B)):
            assert drafted.token_BT[row, 0] == text.token_BS[row, n - 1]
            of_row = expected[row, n - 1 : n - 1 + DRAFT]
            np.testing.assert_allclose(stored[row], of_row, rtol=1e-4, atol=1e-4)
        text = after(text, drafted, accepted)
        count_B = jnp.asarray(accepted) + 1
        verdict = Verdict(jnp.zeros((2, DRAFT + 1)), jnp.asarray(accepted), jnp.full(2, 20))
        outcome = Outcome(drafted, jnp.zeros(()), None, verdict, text, count_B)  # type: ignore[arg-type]
        own = update(weights, own, outcome)
        memory = TARGET.model.keep(partial.memory, None, count_B)


def test_temperature_zero_takes_the_most_probable_token():
    _, propose, _, weights = compiled(True)
    greedy = weights._replace(sampler=Sampler(0.0, top_k=9))
    text, memory, own = start(True)
    drafted = propose(greedy, own, text, memory).tree
    logprobs = np.asarray(drafted.logprob_BTV)[:, :-1]
    np.testing.assert_array_equal(drafted.token_BT[:, 1:], logprobs.argmax(axis=-1))
    assert (np.isneginf(logprobs).sum(axis=-1) == 22).all() and not np.isnan(logprobs).any()


def packed() -> dict[str, jax.Array]:
    """Returns rows of two documents each; the last two tokens have weight 0."""
    return {
        'tokens': jax.random.randint(jax.random.key(6), (4, 16), 1, 23),
        'positions': jnp.concatenate([jnp.arange(10), jnp.arange(6)])[None].repeat(4, 0),
        'segments': jnp.asarray([[1] * 10 + [2] * 6] * 4),
        'weights': jnp.ones((4, 16)).at[:, -2:].set(0.0),
    }


def test_packed_documents_do_not_see_each_other():
    loss = jax.jit(adapter_lib.loss, static_argnums=(2, 3))

    def nats(batch) -> float:
        return float(loss(ADAPTER, PARAMS, CONFIG, E, batch).sums['nats_per_token'].total)

    both = packed()
    parts = [{k: x[:, s] for k, x in both.items()} for s in (slice(0, 10), slice(10, 16))]
    np.testing.assert_allclose(nats(both), sum(map(nats, parts)), rtol=1e-5)


def test_training_the_adapter_brings_it_nearer_to_the_target():
    batch = packed()
    loss = functools.partial(adapter_lib.loss, params=PARAMS, config=CONFIG, layers=E, batch=batch)
    optimizer = optax.adam(0.03)

    @jax.jit
    def train(adapter, state):
        (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(adapter)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(adapter, updates), state, value, sums, gradient

    adapter = adapter_lib.init(jax.random.key(7), CONFIG)
    state = optimizer.init(adapter)
    values = []
    for _ in range(20):
        adapter, state, value, sums, gradient = train(adapter, state)
        values.append(float(value))
    logits = jax.jit(transformer.forward, static_argnums=1)(
        PARAMS, CONFIG, batch['tokens'], batch['positions'], batch['segments']
    )
    entropy = -jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), axis=-1)
    least = float((entropy * batch['weights']).sum() / batch['weights'].sum())
    assert values[-1] - least < 0.7 * (values[0] - least) and values[-1] > least
    assert sums['nats_per_token'].count == 4 * 14 and all(
        jnp.any(g != 0) for g in jax.tree.leaves(gradient)
    )
    np.testing.assert_allclose(sums['nats_per_token'].mean, values[-1], rtol=1e-5)


def test_sizes_count_what_a_draft_call_runs():
    bare, adapted = drafter(False), drafter(True)
    count = params_lib.count(CONFIG)
    layer = (count - 2 * 23 * 16 - 16) // 3
    own = sum(x.size for x in jax.tree.leaves(ADAPTER))
    assert bare.provenance.size == E * layer + 23 * 16
    assert adapted.provenance.size - bare.provenance.size == own
    assert bare.provenance.calls == DRAFT
    assert (bare.method.nodes, bare.method.shared_layers) == (DRAFT + 1, E)


@pytest.mark.parametrize(('layers', 'length'), [(0, 2), (3, 2), (1, 0)])
def test_sizes_out_of_range_are_refused(layers, length):
    with pytest.raises(ValueError, match='early_exit'):
        early_exit(TARGET, layers, length)
