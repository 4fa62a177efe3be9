"""Eight devices compute the same as one, and token tables are not communicated."""

import dataclasses
import functools
import importlib

import jax
import numpy as np
import optax
import pytest

from decoding import model
from decoding.drafts.chain import chain
from decoding.drafts.early_exit import early_exit
from decoding.generate import generate
from experiments import run
from lm.data.packing import Shared
from lm.devices import mesh
from lm.losses import next_token as losses
from lm.model import leaves, params, presets
from lm.model.config import Lexinvariant
from lm.training import train
from tokenization.transfer import hypernetwork
from tokenization.transfer import losses as hypernetwork_losses
from tokenization.transfer.hypernetwork import HypernetworkConfig

STEPS = 20
SHAPE = B, L = 4, 12
TINY = dataclasses.replace(presets.tiny(64), d_model=16, n_layers=1, d_ff=32, tied=True)
ONE, MANY = None, 'data=4,model=2'


def grid(text):
    devices = jax.devices('cpu')
    return mesh.make(text, devices if text else devices[:1])


def batches(vocab_size):
    """Returns a packed batch per step: two texts per row, followed by padding."""
    random = np.random.default_rng(0)
    segments = np.where(np.arange(L) < 7, 1, np.where(np.arange(L) < L - 2, 2, 0))
    segments = np.broadcast_to(segments, SHAPE).astype(np.int32)
    for _ in range(STEPS):
        tokens = random.integers(0, vocab_size, (B, L + 1)).astype(np.int32)
        yield {
            'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segments': segments,
            'positions': np.broadcast_to(np.arange(L, dtype=np.int32) % 7, SHAPE),
            'weights': (segments > 0).astype(np.float32),
        }  # fmt: skip


def trained(text, init, placed, loss, data, frozen=()):
    """Returns losses and parameters of 20 steps on a mesh, and the compiled step."""
    here = grid(text)
    # SGD: Adam divides by the size of gradients, which amplifies rounding errors of small ones
    sgd = optax.sgd(0.1, momentum=0.9)
    weights = jax.jit(init, out_shardings=placed(here))(jax.random.key(0))
    state = train.init_state(weights, sgd, here)
    where = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(functools.partial(train.train_step, loss, sgd, 0), out_shardings=(where, None))
    values = []
    with jax.set_mesh(here):
        for i, batch in enumerate(data):
            batch = train.put(batch, here)
            if i == 0:
                compiled = step.lower(state, batch, *frozen).compile()
            state, metrics = compiled(state, batch, *frozen)
            values.append(float(metrics['loss']))
    return np.array(values), jax.device_get(state.params), compiled.as_text()


def assert_equal(one, many):
    np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(one[1]), jax.tree.leaves(many[1]), strict=True
    ):
        np.testing.assert_allclose(y, x, atol=1e-5, err_msg=jax.tree_util.keystr(path))


KINDS = {
    'transformer': dataclasses.replace(TINY, vocab_size=2048, tied=False),  # several chunks
    'gaussian': dataclasses.replace(TINY, lexinvariant=Lexinvariant('gaussian')),
    'permuted': dataclasses.replace(TINY, lexinvariant=Lexinvariant('permuted')),
    'partial': dataclasses.replace(TINY, lexinvariant=Lexinvariant('gaussian', 0.5)),
}


@pytest.mark.parametrize('kind', KINDS)
def test_training(kind):
    config = KINDS[kind]

    def loss(weights, batch, key):
        return losses.next_token_loss(weights, config, batch, 1e-4, key)

    one, many = (
        trained(
            text, functools.partial(params.init, config),
            lambda m: params.shardings(config, m), loss, batches(config.vocab_size),
        )
        for text in (ONE, MANY)
    )  # fmt: skip
    assert_equal(one, many)
    # table rows stay on their devices: the loss's loop communicates only sums
    in_loops = [line for line in many[2].splitlines() if 'while/body/' in line]
    assert any('all-reduce' in line for line in in_loops)
    for line in in_loops:
        if 'dot_general' not in line or 'tc,' in line or 'blc,' in line:  # not the blocks' own
            assert ' all-gather(' not in line, line


@pytest.mark.slow
def test_training_a_hypernetwork():
    model = dataclasses.replace(TINY, vocab_size=64)
    shape = HypernetworkConfig(
        vocab_size=63, d_model=16, tied=True, n_layers=1, head_dim=8, pieces=3, chunk=32,
        residual=True,
    )  # fmt: skip
    source = params.init(model, jax.random.key(1))
    pieces = np.full((64, 3), -1, np.int32)
    pieces[:-1] = np.random.default_rng(1).integers(0, 63 + 256, (63, 3))
    pieces[::2, 1:] = -1

    def loss(weights, batch, key, source):
        return hypernetwork_losses.transfer_loss(weights, shape, model, 63, 0.5, source, batch)

    def data():
        return ({**batch, 'pieces': Shared(pieces)} for batch in batches(64))

    runs = [
        trained(
            text, functools.partial(hypernetwork.init, shape, source['tables']),
            lambda m: leaves.placed(hypernetwork.leaves(shape), m), loss, data(),
            frozen=(jax.device_put(source, params.shardings(model, grid(text))),),
        )
        for text in (ONE, MANY)
    ]  # fmt: skip
    assert_equal(*runs)


@pytest.mark.parametrize('drafted', ['chain', 'early exit'])
def test_decoding_with_a_drafter(drafted):
    config = dataclasses.replace(TINY, n_layers=2, tied=False)
    small = dataclasses.replace(config, n_layers=1)

    known = [(c, jax.device_get(params.init(c, jax.random.key(0)))) for c in (config, small)]

    def texts(text):
        here = grid(text)
        with jax.set_mesh(here):
            target, draft = (
                model.transformer(c, jax.device_put(weights, params.decoding_shardings(c, here)))
                for c, weights in known
            )
            drafter = chain(draft, 2) if drafted == 'chain' else early_exit(target, 1, 2)
            prompts = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]
            return generate(
                target, prompts, key=jax.random.key(1), max_new_tokens=8, drafter=drafter
            )

    one, many = (texts(text) for text in (ONE, MANY))
    assert [x.tolist() for x in many.tokens] == [x.tolist() for x in one.tokens]
    for field in ('rounds', 'acceptance_by_depth', 'acceptance_by_rank'):
        assert getattr(many.metrics, field) == getattr(one.metrics, field)


def test_decoding_where_sequences_are_cut_is_refused_before_any_work(tmp_path):
    cut = mesh.make('sequence=2', jax.devices('cpu')[:2])
    for name, given in (('speculative', []), ('generate', ['--bundle', 'none', '--prompt', 'p'])):
        config = importlib.import_module(f'experiments.{name}.config')
        command = run.parse(name, config, given)
        with pytest.raises(ValueError, match=r'decoding: not supported .* sequence=2'):
            importlib.import_module(f'experiments.{name}.main').main(command.config, tmp_path, cut)
    assert not list(tmp_path.iterdir())


def test_the_flag_is_that_of_experiments_that_run_on_a_mesh(capsys):
    for name, default in (('pretrain', 'auto'), ('generate', 'one')):
        module = importlib.import_module(f'experiments.{name}.config')
        given = [] if name == 'pretrain' else ['--bundle', 'b', '--prompt', 'p']
        assert run.parse(name, module, given).mesh == default
        assert run.parse(name, module, [*given, '--mesh', MANY]).mesh == MANY
    module = importlib.import_module('experiments.compress.config')
    with pytest.raises(SystemExit):
        run.parse('compress', module, ['file', '--model', 'm', '--mesh', 'auto'])
    assert '--mesh' in capsys.readouterr().err
