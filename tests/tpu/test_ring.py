"""A block of a model on sequences cut over TPU chips: the more chips, the less each one holds."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from experiments.plan import chips
from experiments.plan import compile as ahead
from lm import mesh as mesh_lib
from lm import params, transformer
from lm.config import Config
from lm.kernels.mask import Mask

pytestmark = pytest.mark.tpu

DEVICES = (1, 2, 4, 8)
LENGTH = 16_384
MODEL = Config(
    1024, 1024, 1, 8, 2, 128, 2048, max_length=LENGTH, dtype='bfloat16', param_dtype='bfloat16'
)


def gradients(weights, x_BLD, positions_BL, segments_BL):
    """Of the squares of what a block makes of one packed row."""

    def total(weights, x_BLD):
        mask = Mask(positions_BL, positions_BL[:, None], segments_BL, segments_BL)
        x_BLD, _ = transformer.blocks(weights, MODEL, x_BLD, mask)
        return jnp.sum(x_BLD.astype(jnp.float32) ** 2)

    return jax.grad(total, argnums=(0, 1))(weights, x_BLD)


@functools.cache
def compiled(devices: int):
    """`gradients` for so many chips of a slice."""
    found = ahead.devices(chips.parse('v5e:2x4'))[:devices]
    grid = mesh_lib.make(f'data=1,sequence={devices}', found)

    def array(shape, dtype):
        sharding = mesh_lib.sharding(grid, ('batch', 'length', None)[: len(shape)], shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    weights = params.abstract(MODEL, grid)['body']
    tokens = array((1, LENGTH), jnp.int32)
    arguments = (weights, array((1, LENGTH, MODEL.d_model), jnp.bfloat16), tokens, tokens)
    with jax.set_mesh(grid):
        return jax.jit(gradients).lower(*arguments).compile()


def test_memory_of_a_chip_falls_with_the_number_of_chips(capsys):
    held = []
    for devices in DEVICES:
        memory = compiled(devices).memory_analysis()
        held.append((memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 2**20)
    with capsys.disabled():
        shown = ', '.join(f'{n}: {x:.0f}' for n, x in zip(DEVICES, held))
        print(f'\nMiB of a chip, arguments and temporaries, by chips along sequence: {shown}')
    assert all(more < 0.75 * less for less, more in itertools.pairwise(held))


def test_blocks_are_under_way_while_kernels_run():
    text = compiled(8).as_text()
    assert 'custom_call_target="tpu_custom_call"' in text
    assert 'collective-permute-start' in text and 'collective-permute-done' in text
    # no device ever holds the keys of a whole row
    assert f'bf16[1,2,{LENGTH},128]' not in text and f'bf16[1,{LENGTH},2,128]' not in text
