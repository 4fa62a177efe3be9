"""Attention of one long row and its gradients, cut over TPU chips: what each holds and sends."""

import functools

import jax
import jax.numpy as jnp
import pytest

from experiments.plan import chips
from experiments.plan import compile as ahead
from lm.attention import attention
from lm.devices import mesh as mesh_lib
from lm.kernels.mask import Mask
from lm.kernels.scoring import Scoring

pytestmark = pytest.mark.tpu

LENGTH, HEADS, KV_HEADS, CHANNELS = 32_768, 8, 2, 128


def gradients(q_BLHC, k_BKSC, v_BKSC, positions_BL, segments_BL, d_out_BLHC):
    mask = Mask(positions_BL, positions_BL[:, None], segments_BL, segments_BL)

    def attend(q_BLHC, k_BKSC, v_BKSC):
        return attention.attention(q_BLHC, k_BKSC, v_BKSC, mask, scoring=Scoring(CHANNELS**-0.5))

    out_BLHC, vjp = jax.vjp(attend, q_BLHC, k_BKSC, v_BKSC)
    return out_BLHC, vjp(d_out_BLHC)


@functools.cache
def compiled(devices: int):
    """`gradients` for so many chips of a slice."""
    found = ahead.devices(chips.parse('v5e:2x4'))[:devices]
    grid = mesh_lib.make(f'data=1,sequence={devices}', found)

    def array(axes, dtype, *shape):
        sharding = mesh_lib.sharding(grid, axes, shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    queries, keys = ('batch', 'length', 'heads', None), ('batch', 'kv_heads', 'length', None)
    q = array(queries, jnp.bfloat16, 1, LENGTH, HEADS, CHANNELS)
    k = array(keys, jnp.bfloat16, 1, KV_HEADS, LENGTH, CHANNELS)
    tokens = array(('batch', 'length'), jnp.int32, 1, LENGTH)
    with jax.set_mesh(grid):
        return jax.jit(gradients).lower(q, k, k, tokens, tokens, q).compile()


def test_memory_of_a_chip_falls_with_the_number_of_chips(capsys):
    held = {}
    for devices in (1, 2, 4, 8):
        memory = compiled(devices).memory_analysis()
        held[devices] = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        held[devices] += memory.output_size_in_bytes
    with capsys.disabled():
        shown = ', '.join(f'{n}: {size / 2**20:.0f}' for n, size in held.items())
        print(f'\nMiB of a chip by chips along sequence: {shown}')
    # f32 sums and blocks under way, which a single chip has not, are cut as all else is
    assert held[4] < 0.75 * held[1]
    assert held[4] < 0.6 * held[2] and held[8] < 0.6 * held[4]


def test_blocks_are_under_way_while_kernels_run():
    text = compiled(8).as_text()
    assert 'custom_call_target="tpu_custom_call"' in text
    assert 'collective-permute-start' in text and 'collective-permute-done' in text
    # no device ever holds the keys of a whole row
    assert 'all-gather' not in text and f',{LENGTH},' not in text
