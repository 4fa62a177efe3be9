"""Invariants of any decoder, for any weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels.mask import pack_bits
from lm.losses import next_token as losses
from lm.model import lexinvariant, params, presets, rope, stepped, tables, transformer
from lm.model.config import Config, RopeScaling
from lm.model.contract import Nodes, chain
from tests.lm.model.steps import empty, step

# Every optional feature at once, in three layers; the middle one sees all keys.
FULL = Config(
    97, 32, 3, 4, 2, 16, 48, max_length=64, activation='gelu_tanh', unit_offset=True,
    post_norm=True, qk_norm=True, qkv_bias=True, attention_softcap=20.0, logit_softcap=10.0,
    scale_embeddings=True, tied=True, local_rope_theta=500.0, window=5,
    rope_scaling=RopeScaling('llama3', 4.0, original_length=32), window_pattern=(True, False),
)  # fmt: skip
PLAIN = Config(97, 32, 2, 4, 4, 8, 48, max_length=64)


@pytest.fixture(scope='module', params=[FULL, PLAIN], ids=['full', 'plain'])
def model(request):
    config = request.param
    weights = params.init(config, jax.random.key(0))
    # biases and norms start at constants, which would hide a bug: shake every leaf
    leaves, tree = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return config, jax.tree.unflatten(tree, leaves)


@pytest.fixture(scope='module')
def tokens():
    return jax.random.randint(jax.random.key(2), (2, 12), 0, 97)


def test_no_logit_depends_on_a_later_token(model, tokens):
    config, weights = model
    x = tables.embed(weights['tables'], config, tokens)

    def total(x):
        nodes = chain(tokens)._replace(x_BTD=x)
        return (transformer.read(weights, config, nodes).h_BTD[:, 6] ** 2).sum()

    gradient = jnp.abs(jax.grad(total)(x)).sum(-1)
    assert (gradient[:, 7:] == 0).all()
    assert (gradient[:, 6] > 0).all()


def test_segments_do_not_see_each_other(model, tokens):
    config, weights = model
    both = transformer.forward(
        weights, config, tokens,
        jnp.concatenate([jnp.arange(5), jnp.arange(7)])[None].repeat(2, 0),
        jnp.asarray([[1] * 5 + [2] * 7] * 2),
    )  # fmt: skip
    alone = transformer.forward(weights, config, tokens[:, 5:])
    np.testing.assert_allclose(both[:, 5:], alone, rtol=1e-5, atol=1e-5)


def test_cached_steps_equal_the_full_forward_for_ragged_rows(model, tokens):
    config, weights = model
    full = transformer.forward(weights, config, tokens)
    # row 0 reads 4 tokens and row 1 reads 7: prefill 7, then take 3 back from row 0
    logits, memory = step(weights, config, empty(config, 2, 16), tokens[:, :7])
    np.testing.assert_allclose(logits, full[:, :7], rtol=1e-4, atol=1e-4)
    memory = stepped.model(config).keep(memory, None, jnp.asarray([4, 7]))
    for i in range(5):
        at = jnp.asarray([4 + i, 7 + i])
        token = jnp.take_along_axis(tokens, at[:, None], 1)
        logits, memory = step(weights, config, memory, token)
        np.testing.assert_allclose(logits[:, 0], full[jnp.arange(2), at], rtol=1e-4, atol=1e-4)


def test_each_path_of_a_tree_gets_the_logits_of_that_path_alone(model, tokens):
    config, weights = model
    # nodes:  0 -> 1 -> 3,  0 -> 2 -> 4
    parents = [-1, 0, 0, 1, 2]
    ancestors = np.eye(5, dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            ancestors[node] |= ancestors[parent]
    depth = ancestors.sum(1) - 1
    prefix, nodes = tokens[:, :4], tokens[:, 4:9]
    _, memory = step(weights, config, empty(config, 2, 12), prefix)
    bits = pack_bits(jnp.broadcast_to(ancestors, (2, 5, 5)))
    drafted = Nodes(nodes, jnp.broadcast_to(4 + depth, (2, 5)), bits)
    logits, _ = step(weights, config, memory, drafted)
    for path in ([0, 1, 3], [0, 2, 4]):
        text = jnp.concatenate([prefix, nodes[:, jnp.asarray(path)]], 1)
        alone = transformer.forward(weights, config, text)[:, 4:]
        np.testing.assert_allclose(logits[:, jnp.asarray(path)], alone, rtol=1e-4, atol=1e-4)


def test_options_for_speed_do_not_change_the_result(model, tokens):
    config, weights = model
    plain = transformer.forward(weights, config, tokens)
    faster = dataclasses.replace(config, remat=True, unroll=config.n_layers)
    np.testing.assert_allclose(
        transformer.forward(weights, faster, tokens), plain, rtol=1e-5, atol=1e-5
    )


def test_rope_makes_attention_depend_on_distance_alone():
    config = dataclasses.replace(PLAIN, n_layers=1)
    weights = params.init(config, jax.random.key(0))
    tokens = jnp.arange(6)[None]
    here = transformer.forward(weights, config, tokens, jnp.arange(6)[None])
    there = transformer.forward(weights, config, tokens, jnp.arange(6)[None] + 31)
    np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-4)


def test_an_f32_config_computes_in_f32_everywhere(tokens):
    weights = params.init(FULL, jax.random.key(0))

    def loss(weights):
        batch = {'tokens': tokens, 'targets': tokens, 'weights': jnp.ones(tokens.shape)}
        batch |= {'segments': jnp.ones_like(tokens), 'positions': jnp.zeros_like(tokens)}
        return losses.next_token_loss(weights, FULL, batch)[0]

    def logits(weights):
        return step(weights, FULL, empty(FULL, 2, 16), tokens)[0]

    for traced in (jax.make_jaxpr(jax.grad(loss))(weights), jax.make_jaxpr(logits)(weights)):
        text = str(traced)
        assert 'bf16' not in text
        exact = text.count('precision=(Precision.HIGHEST, Precision.HIGHEST)')
        assert exact == text.count('dot_general[') > 0


def test_logits_of_a_bf16_model_are_not_rounded_to_bf16(tokens):
    config = dataclasses.replace(PLAIN, dtype='bfloat16')
    logits = transformer.forward(params.init(config, jax.random.key(0)), config, tokens)
    assert logits.dtype == jnp.float32
    assert (logits.astype(jnp.bfloat16).astype(jnp.float32) != logits).mean() > 0.5


@pytest.mark.filterwarnings('error::FutureWarning')  # of a wide value in a narrow array
@pytest.mark.parametrize(('n_kv_heads', 'dtype'), [(1, 'bfloat16'), (2, 'float32')])
def test_induction_heads_find_successors_of_tokens_equal_to_the_query(n_kv_heads, dtype):
    config = dataclasses.replace(
        presets.tiny(8), d_model=64, n_heads=2, n_kv_heads=n_kv_heads, head_dim=32, qkv_bias=True,
        induction_init=True, param_dtype=dtype,
    )  # fmt: skip
    layers = params.init(config, jax.random.key(0))['body']['layers']
    symbol_VD = lexinvariant.fixed_table(config, jnp.arange(64))

    def written(layer):  # by one that attends to each symbol
        values = jnp.einsum('vd,dkc->vkc', symbol_VD, layers['wv_NDKC'][layer])
        values = values.repeat(2 // n_kv_heads, axis=1)
        return jnp.einsum('vhc,hcd->vd', values, layers['wo_NHCD'][layer])

    query = jnp.einsum('vd,dc->vc', symbol_VD, layers['wq_NDHC'][1, :, 0])
    key = jnp.einsum('vd,dc->vc', written(0), layers['wk_NDKC'][1, :, 0])
    match = query @ key.T
    assert (match.argmax(axis=1) == jnp.arange(64)).mean() > 0.6  # by chance: 1 / 64
    assert ((written(1) @ symbol_VD.T).argmax(axis=1) == jnp.arange(64)).mean() > 0.6
    assert (layers['wk_NDKC'][0] == 0).all()
    assert {x.dtype.name for x in layers.values()} == {dtype}


@pytest.mark.parametrize('head_dim', [16, 64])
def test_the_layer_before_induction_heads_attends_to_the_previous_token(head_dim):
    config = dataclasses.replace(presets.tiny(8), head_dim=head_dim, qkv_bias=True,
                                 induction_init=True)  # fmt: skip
    layers = params.init(config, jax.random.key(0))['body']['layers']
    positions = jnp.arange(9)[None]

    def turned(name):
        bias = jnp.broadcast_to(layers[name][0], (1, 9, *layers[name][0].shape))
        return rope.rotate(bias, positions, rope.frequencies(config)[0])

    logits = jnp.einsum('lhc,shc->hls', turned('bq_NHC')[0], turned('bk_NKC')[0][:, :1])
    lead = config.query_scale * logits[0, 8]  # of the last query, over all keys
    assert lead.argmax() == 7
    np.testing.assert_allclose(lead[7] - lead[jnp.asarray([6, 8])], 6.0, rtol=1e-4)
    assert (layers['bq_NHC'][1:] == 0).all()


@pytest.mark.parametrize('preset', presets.PRESETS, ids=lambda f: f.__name__)
def test_presets_have_the_size_that_their_name_says(preset):
    config = preset()
    expected = {
        'tiny': (0.05e6, 0.1e6), 'm1_3m': (3.0e6, 3.3e6), 'm2_25m': (24e6, 26e6),
        'm2_113m': (112e6, 114e6), 'm2_403m': (402e6, 404e6), 'm2_2b': (1.5e9, 2.1e9),
        'llama2_7b': (6.4e9, 6.5e9), 'llama3_8b': (6.9e9, 7.0e9), 'mistral_7b': (6.9e9, 7.0e9),
        'qwen2_7b': (6.5e9, 6.6e9), 'qwen3_8b': (6.9e9, 7.0e9), 'gemma2_9b': (8.3e9, 8.4e9),
        'gemma3_27b': (25.5e9, 25.7e9),
    }[preset.__name__]  # fmt: skip
    assert expected[0] <= params.count_body(config) <= expected[1]


@pytest.mark.parametrize(
    ('field', 'value'),
    [('n_kv_heads', 3), ('head_dim', 15), ('dtype', 'float16'), ('d_ff', 0), ('window', 0)],
)
def test_a_bad_config_names_the_field(field, value):
    named = 'n_heads' if field == 'n_kv_heads' else field
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(PLAIN, **{field: value})


@pytest.mark.parametrize(
    'fields', [{'qkv_bias': False}, {'n_layers': 1}, {'qk_norm': True}, {'attention_softcap': 50.0}]
)
def test_induction_heads_need_biases_and_two_layers(fields):
    with pytest.raises(ValueError, match='induction_init: True; expected False, or two layers'):
        dataclasses.replace(presets.tiny(8), **{'qkv_bias': True, 'induction_init': True, **fields})
