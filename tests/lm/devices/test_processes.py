"""Processes configured by environment variables, and errors that name an invalid one."""

import pytest

from lm.devices import processes
from lm.devices.processes import ADDRESS, COUNT, INDEX

WHOLE = {ADDRESS: 'host:1234', COUNT: '4', INDEX: '3'}


def test_three_variables_configure_the_processes():
    assert processes.named({}) is None
    assert processes.named(WHOLE) == {
        'coordinator_address': 'host:1234', 'num_processes': 4, 'process_id': 3,
    }  # fmt: skip


@pytest.mark.parametrize('missing', WHOLE)
def test_a_missing_variable_is_named(missing):
    with pytest.raises(ValueError, match=f'set, but not {missing}: set all three'):
        processes.named({name: value for name, value in WHOLE.items() if name != missing})


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [(COUNT, 'four', 'expected a number'), (COUNT, '²', 'expected a number'),
     (INDEX, '-1', 'expected a number'), (INDEX, '4', 'expected 0 to'), (COUNT, '0', 'at least 1'),
     (ADDRESS, 'host', 'expected host:port'), (ADDRESS, ':1234', 'expected host:port'),
     (ADDRESS, 'host:x', 'expected host:port'), (ADDRESS, 'host:99999', 'expected host:port')],
)  # fmt: skip
def test_an_invalid_value_is_named(name, value, message):
    with pytest.raises(ValueError, match=f'{name}.*{message}'):
        processes.named({**WHOLE, name: value})


@pytest.mark.parametrize(
    ('environment', 'joins'),
    [
        ({'TPU_WORKER_HOSTNAMES': 'host-0,host-1'}, True),
        ({'TPU_WORKER_HOSTNAMES': 'host-0'}, False),
        ({'TPU_WORKER_HOSTNAMES': 'WARNING: no TPU here, so none'}, False),
        ({'SLURM_STEP_NUM_TASKS': '8'}, True),
        ({'SLURM_STEP_NUM_TASKS': '1'}, False),
        ({'OMPI_COMM_WORLD_SIZE': '2'}, True),
    ],
)
def test_variables_of_a_cluster_are_left_to_jax(environment, joins):
    assert processes.named(environment) == ({} if joins else None)


def test_a_single_process_does_not_wait(tmp_path):
    processes.wait('here')
    processes.check_together(tmp_path, 'anything')
    assert processes.is_first() and processes.agree(True) and not processes.agree(False)
    with processes.new_folder(tmp_path / 'made') as folder:
        (folder / 'x').write_text('x')
    assert [p.name for p in tmp_path.iterdir()] == ['made']
