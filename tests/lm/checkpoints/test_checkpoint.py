"""Checkpoints are what was saved, on any mesh, or are said not to be."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from lm.checkpoints import restore
from lm.checkpoints.checkpoint import Checkpoints
from lm.devices import mesh
from tests.lm.checkpoints import make

OLD = pathlib.Path(__file__).parent / 'old'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run with the checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp('run')
    return folder, make.trained(folder, 8)


@pytest.fixture
def copy(run, tmp_path):
    return pathlib.Path(shutil.copytree(run[0], tmp_path / 'run'))


def restored(folder, like):
    """Returns step, state and place in the data of what a run would go on from."""
    checkpoints, iterator = Checkpoints(folder / 'checkpoints'), iter(make.batches())
    try:
        step, state = checkpoints.restore(like, iterator)
        return step, make.digest(state), iterator.get_state()
    finally:
        checkpoints.close()
        iterator.close()


def like_of(state):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, state)


@pytest.fixture(scope='module')
def whole(run, tmp_path_factory):
    """What steps 4 and 8 hold, each restored where it is the newest, and nothing was damaged."""
    earlier = tmp_path_factory.mktemp('earlier') / 'run'
    shutil.copytree(run[0], earlier)
    shutil.rmtree(earlier / 'checkpoints' / '8')
    steps = {step: (step, *rest) for folder in (run[0], earlier)
             for step, *rest in [restored(folder, like_of(run[1]))]}  # fmt: skip
    assert steps.keys() == {4, 8} and steps[8][1] == make.digest(run[1]) != steps[4][1]
    return steps


def files(folder):
    return sorted(path for path in folder.rglob('*') if path.is_file())


def flip(file, at=None):
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 0x10
    file.write_bytes(content)


def step_8(folder):
    return folder / 'checkpoints' / '8'


# What a step cannot be read without; Orbax also leaves copies and notes.
NEEDED = (
    'checksums/metadata', 'data/process_0-of-1.json', 'state/_METADATA', 'state/manifest.ocdbt',
    'state/d/',
)  # fmt: skip


@pytest.mark.parametrize('damage', [flip, pathlib.Path.unlink])
def test_damage_to_any_file_of_a_step_is_seen(run, whole, tmp_path, capfd, damage):
    like = like_of(run[1])
    for i, file in enumerate(files(step_8(run[0]))):
        folder = shutil.copytree(run[0], tmp_path / str(i))
        name = file.relative_to(step_8(run[0])).as_posix()
        damage(step_8(folder) / name)
        result = restored(folder, like)
        # never another state, whatever the file is for
        assert result == whole[result[0]], name
        assert result[0] == 4 or not name.startswith(NEEDED), name
        said, aside = capfd.readouterr().err, folder / 'checkpoints.damaged' / '8'
        assert aside.exists() == ('step 8 cannot be used: ' in said) == (result[0] == 4)
        # one line, though much is read at once
        assert said.count('\n') == (result[0] == 4), said
        assert 'state/ cannot be read (Encountered' not in said  # where, and not in which leaf


def resave(folder, change):
    """Saves step 8 again with its state changed, and with the checksums of what it was."""
    like = like_of_saved(step_8(folder))
    state = restore.leaves(epath.Path(step_8(folder)) / 'state', like)
    shutil.rmtree(step_8(folder) / 'state')
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(step_8(folder) / 'state', change(state))


def like_of_saved(step):
    one = NamedSharding(mesh.make(devices=jax.devices()[:1]), PartitionSpec())
    saved = ocp.PyTreeCheckpointHandler().metadata(epath.Path(step) / 'state').tree
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), saved)


def with_norm(state, change):
    body = state['params']['body']
    body = {**body, 'final_norm_D': change(body['final_norm_D'])}
    return {**state, 'params': {**state['params'], 'body': body}}


def half(x):
    return x.astype(jnp.bfloat16)


@pytest.mark.parametrize(
    'change, said',
    [
        (lambda x: x.at[3].add(1e-6), 'differs in params/body/final_norm_D from'),
        (half, 'has params/body/final_norm_D as bfloat16[8], but it was saved as float32[8]'),
    ],
)
def test_whole_files_of_another_state_are_seen(run, whole, copy, capfd, change, said):
    resave(copy, lambda state: with_norm(state, change))
    assert restored(copy, like_of(run[1])) == whole[4]
    assert f'step 8 cannot be used: state/ {said}' in capfd.readouterr().err


def test_a_run_goes_on_from_the_step_before_a_damaged_one_and_ends_the_same(run, copy, capfd):
    flip(step_8(copy) / 'checksums' / 'metadata')
    assert make.digest(make.trained(copy, 8)) == make.digest(run[1])
    assert 'step 8 cannot be used' in capfd.readouterr().err
    for name in ('metrics.jsonl', 'checkpoints/8/data/process_0-of-1.json'):
        assert (copy / name).read_bytes() == (run[0] / name).read_bytes()
    # again: the damaged folders do not get into each other's way
    flip(step_8(copy) / 'checksums' / 'metadata')
    make.trained(copy, 8)
    assert sorted(path.name for path in (copy / 'checkpoints.damaged').iterdir()) == ['8', '8.1']


def test_half_a_step_is_no_step(run, whole, copy):
    # written in the middle of a save, and in the middle of a deletion
    shutil.copytree(step_8(copy), copy / 'checkpoints' / '12.orbax-checkpoint-tmp')
    shutil.rmtree(step_8(copy) / 'data')
    shutil.rmtree(step_8(copy) / 'state' / 'd')
    assert restored(copy, like_of(run[1])) == whole[4]


def test_where_no_step_is_whole_nothing_is_moved_or_deleted(run, copy):
    for step in (4, 8):
        flip(copy / 'checkpoints' / str(step) / 'state' / '_METADATA')
    before = [(file, file.read_bytes()) for file in files(copy)]
    with pytest.raises(OSError, match=r'no intact checkpoint: step 8: .*; step 4: .*') as error:
        restored(copy, like_of(run[1]))
    assert '\n' not in str(error.value)
    assert [(file, file.read_bytes()) for file in files(copy)] == before


def test_the_checkpoints_of_another_model_are_not_damaged(run, copy):
    like = like_of(run[1])
    other = like.replace(params=jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), like.params))
    with pytest.raises(ValueError, match=r'does not fit this model.*is float32.*expected bfloat16'):
        restored(copy, other)
    more = like.replace(params={**like.params, 'new': like.step})
    with pytest.raises(ValueError, match='params/new is missing'):
        restored(copy, more)
    fewer = like.replace(params={'body': like.params['body']})
    with pytest.raises(ValueError, match='tables/input_VD is not part of this model'):
        restored(copy, fewer)
    assert not (copy / 'checkpoints.damaged').exists()


def test_a_checkpoint_of_an_older_version_loads_and_trains_on(tmp_path):
    shutil.copytree(OLD, tmp_path / 'old')
    state = make.trained(tmp_path / 'old', 4)
    assert make.digest(state) == json.loads((OLD / 'digest.json').read_text())['sha256']
    make.trained(tmp_path / 'old', 8)
    assert not (tmp_path / 'old' / 'checkpoints.damaged').exists()
    # its place in the data, too
    batches = iter(make.batches())
    ahead = [next(batches) for _ in range(5)][-1]
    place = json.loads((OLD / 'checkpoints/4/data/process_0-of-1.json').read_text())
    batches.set_state(place)
    jax.tree.map(np.testing.assert_array_equal, next(batches), ahead)
