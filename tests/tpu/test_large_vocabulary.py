"""The search over a million rows of bf16, compiled for one TPU chip and for four: no copies."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from decoding import large_vocabulary
from decoding.large_vocabulary import Table
from experiments.plan import chips
from experiments.plan import compile as ahead
from lm.devices import mesh as mesh_lib

pytestmark = pytest.mark.tpu

V, D, B = 1 << 20, 4096, 8


@pytest.mark.parametrize(('topology', 'mesh'), [('v6e:1x1', None), ('v5e:2x2', 'data=2,model=2')])
def test_no_logits_and_no_rows_are_held(topology, mesh):
    grid = mesh_lib.make(mesh, ahead.devices(chips.parse(topology)))

    def argument(shape, dtype, *axes):
        sharding = NamedSharding(grid, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def draw(rows_VD, h_BD, key_B):
        table = Table(rows_VD, V, chunk=16_384)
        found = large_vocabulary.search(table, h_BD, 20)
        position_B = jnp.zeros(B, jnp.int32)
        return found, large_vocabulary.draw(table, h_BD, found, key_B, position_B)

    key_dtype = jax.eval_shape(lambda: jax.random.key(0)).dtype
    arguments = (
        argument((V, D), jnp.bfloat16, mesh_lib.AXES),
        argument((B, D), jnp.bfloat16),
        argument((B,), key_dtype),
    )
    with jax.set_mesh(grid):
        compiled = jax.jit(draw).lower(*arguments).compile()
    # all logits would be 34 MB, a chunk of rows 134 MB
    assert compiled.memory_analysis().temp_size_in_bytes < 8e6
