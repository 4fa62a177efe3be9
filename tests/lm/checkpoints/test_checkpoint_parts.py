"""Checkpoints travel between meshes, and parts of them are read alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from lm.checkpoints import bundle, restore
from lm.checkpoints.checkpoint import Checkpoints
from lm.devices import mesh
from lm.files import checksums
from lm.model import params, presets
from lm.training import optimizer as optimizer_lib
from lm.training import state as state_lib
from lm.training import train
from tests.lm.checkpoints import make
from tokenization.vocabularies.byte import ByteTokenizer

MODEL = presets.tiny(512)
BYTES_BESIDE_LEAVES = 200_000  # names, shapes and places of all leaves, some of them read twice


def like_on(grid):
    """Returns the shapes of a train state, and where they lie on a mesh."""
    weights = params.abstract(MODEL, grid)
    # Muon's state has AdamW's in it, for some leaves
    optimizer = optimizer_lib.make(optimizer_lib.OptimizerConfig('muon'), 10, params.leaves(MODEL))
    moments = jax.eval_shape(optimizer.init, weights)
    everywhere = NamedSharding(grid, PartitionSpec())
    shape = train.TrainState(jax.ShapeDtypeStruct((), jnp.int32), weights, moments)
    where = state_lib.optimizer_shardings(weights, moments, grid)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shape,
        train.TrainState(everywhere, params.shardings(MODEL, grid), where),
    )


@pytest.fixture(scope='module')
def sharded(tmp_path_factory):
    """A state saved on (4, 2)."""
    folder = tmp_path_factory.mktemp('sharded')
    like, drawn = like_on(mesh.make('data=4,model=2')), np.random.default_rng(0)

    def draw(x):
        values = drawn.normal(size=x.shape).astype(x.dtype)
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: values[index])

    state = jax.tree.map(draw, like)
    checkpoints = Checkpoints(folder / 'checkpoints')
    checkpoints.save(1, state, iter(make.batches()))
    checkpoints.close()
    return folder, state


@pytest.mark.parametrize('sizes', [(1, 1), (8, 1), (2, 4)])
def test_a_checkpoint_travels_between_meshes(sharded, sizes):
    data, model = sizes
    grid = mesh.make(f'data={data},model={model}', devices=jax.devices()[: data * model])
    like = like_on(grid)
    checkpoints = Checkpoints(sharded[0] / 'checkpoints')
    step, state = checkpoints.restore(like, iter(make.batches()))
    checkpoints.close()
    assert step == 1 and state.params['body']['layers']['wq_NDHC'].sharding.mesh == grid
    jax.tree.map(np.testing.assert_array_equal, state, sharded[1])
    assert checksums.of(state) == checksums.of(sharded[1])


def bytes_read():
    found = tensorstore.experimental_collect_matching_metrics(
        '/tensorstore/kvstore/file/bytes_read'
    )
    return sum(value['value'] for metric in found for value in metric['values'])


@pytest.mark.parametrize('part', ['body', 'tables'])
def test_a_part_of_a_checkpoint_is_read_by_itself(sharded, part):
    grid = mesh.make('data=4,model=2')
    like = {part: params.abstract(MODEL, grid)[part]}
    before = bytes_read()
    loaded = restore.load_params(sharded[0] / 'checkpoints', like)
    read = bytes_read() - before
    jax.tree.map(np.testing.assert_array_equal, loaded[part], sharded[1].params[part])
    assert loaded.keys() == {part}
    size = sum(x.nbytes for x in jax.tree.leaves(loaded))
    assert read < size + BYTES_BESIDE_LEAVES
    with pytest.raises(ValueError, match=r'does not fit this model: .*final_norm_D is float32'):
        restore.load_params(sharded[0] / 'checkpoints', {'body': {'final_norm_D': like_half()}})
    with pytest.raises(FileNotFoundError, match='no step 7; found'):
        restore.load_params(sharded[0] / 'checkpoints', like, 7)


def like_half():
    return jax.ShapeDtypeStruct((MODEL.d_model,), jnp.bfloat16)


@pytest.mark.parametrize('part', ['body', 'tables'])
def test_a_part_of_a_bundle_is_read_by_itself(sharded, tmp_path, part):
    bundle.save(tmp_path / 'bundle', MODEL, sharded[1].params, ByteTokenizer(), 63)
    before = bytes_read()
    config, loaded = bundle.load_part(tmp_path / 'bundle', part)
    read = bytes_read() - before
    assert read < sum(x.nbytes for x in jax.tree.leaves(loaded)) + BYTES_BESIDE_LEAVES
    assert config == MODEL
    jax.tree.map(np.testing.assert_array_equal, loaded, sharded[1].params[part])
    with pytest.raises(ValueError, match="no part 'head'; there are: body, tables"):
        bundle.load_part(tmp_path / 'bundle', 'head')


@pytest.mark.parametrize(
    'dtype', [np.float32, jnp.bfloat16, np.float16, np.int32, np.uint8, bool, jnp.float8_e4m3fn]
)
def test_a_change_to_any_element_changes_the_sum(dtype):
    x = (np.arange(60) % 2).reshape(3, 4, 5).astype(dtype)
    sums = {checksums.of({'x': x})['x']['sum']}
    for i in np.ndindex(x.shape):
        other = x.copy()
        other[i] = not x[i]
        sums.add(checksums.of({'x': other})['x']['sum'])
    assert len(sums) == 61
