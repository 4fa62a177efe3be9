"""The TPU compiler takes every kernel, and whole steps that call them and copy no cache.

Run by `make test-tpu`; needs libtpu and no TPU.
"""

import dataclasses
import re

import jax
import pytest

from experiments.compile_attention import config as kernels_config
from experiments.compile_attention import main as kernels
from experiments.plan import chips, steps
from experiments.plan import compile as ahead
from experiments.plan.config import Config as PlanConfig
from lm.devices import mesh as mesh_lib

pytestmark = pytest.mark.tpu


@pytest.mark.parametrize('target', kernels_config.SCALES['real'].targets)
def test_every_kernel_at_real_sizes(target, capsys):
    rows = kernels.compile_for(kernels_config.SCALES['real'], target)
    assert {row['kernel'] for row in rows} == set(
        kernels.functions(kernels_config.SCALES['real'], target, 'xla')
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
        if not row['kernel'].startswith('flash') and row['temporaries'] is not None:
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


# on the mesh, what is gathered of a layer's parameters comes on top
@pytest.mark.parametrize(
    ('topology', 'mesh', 'temporaries'),
    [('v6e:1x1', None, 8 * 2**20), ('v5e:2x2', 'data=2,model=2', 256 * 2**20)],
)
def test_a_decode_step_reads_its_cache_where_it_lies(topology, mesh, temporaries):
    config = PlanConfig('llama3_8b', topology, 'decode', batch=8, length=2048, mesh=mesh)
    model = dataclasses.replace(steps.model_config(config), n_layers=2, vocab_size=1024)
    chip_mesh = mesh_lib.make(mesh, ahead.devices(chips.parse(topology)))
    made = steps.make(config, model, chip_mesh)
    with jax.set_mesh(chip_mesh):
        compiled = made.function.lower(*made.arguments).compile()
    cache = made.parts['cache'].k_NBKSC
    n, b, k, s, c = cache.sharding.shard_shape(cache.shape)
    copies = re.findall(rf'= bf16\[(?:{n},)?{b},{k},{s},{c}\]\S* copy\(', compiled.as_text())
    assert not copies
    assert compiled.memory_analysis().temp_size_in_bytes < temporaries
