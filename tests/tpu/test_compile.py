"""The TPU compiler takes every kernel, and whole steps on a mesh of chips that call them.

Run by `make test-tpu`; needs libtpu and no TPU.
"""

import jax
import pytest

from experiments.compile_attention import config as kernels_config
from experiments.compile_attention import main as kernels
from experiments.plan import chips, steps
from experiments.plan import compile as ahead
from experiments.plan.config import Config as PlanConfig
from lm import mesh as mesh_lib

pytestmark = pytest.mark.tpu


@pytest.mark.parametrize('target', kernels_config.SCALES['real'].targets)
def test_every_kernel_at_real_sizes(target, capsys):
    rows = kernels.compile_for(kernels_config.SCALES['real'], target)
    assert {row['kernel'] for row in rows} == set(
        kernels.functions(kernels_config.SCALES['real'], 'xla')
    )
    with capsys.disabled():
        for row in rows:
            print(
                f'\n{row["kernel"]} {target}: {row["seconds"]:.1f} s, temporaries '
                f'{row["temporaries"] or 0:.1f} MiB',
                end='',
            )
    for row in rows:
        # neither a copy of a layer of the cache (64 MiB) nor a mask over all of its rows
        if row['kernel'] not in ('flash', 'flash_backward') and row['temporaries'] is not None:
            assert row['temporaries'] < 16


@pytest.mark.parametrize('step', ['train', 'decode'])
def test_a_step_on_a_mesh_calls_the_kernels(step):
    config = PlanConfig(preset='m2_25m', topology='v5e:2x2', step=step, batch=4, length=512)
    topology = chips.parse(config.topology)
    mesh = mesh_lib.make('data=2,model=2', ahead.devices(topology))
    model = steps.model_config(config)
    made = steps.make(config, model, mesh)
    with jax.set_mesh(mesh):
        text = made.function.lower(*made.arguments).compile().as_text()
    assert 'custom_call_target="tpu_custom_call"' in text
