"""Collectives of a compiled program are weighted by the trip counts of their loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.plan import collectives, hlo
from lm.devices import mesh as mesh_lib


def compiled_text(function, *shapes):
    """Compiles a function of f32 arrays, given as (shape, spec); returns the program's text."""
    mesh = mesh_lib.make('data=4,model=2', jax.devices('cpu')[:8])
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in shapes
    ]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*arguments).compile().as_text()


@pytest.fixture(scope='module')
def scanned():
    """Seven layers of x @ a @ b; a is sharded by columns, b by rows: one all-reduce per layer."""

    def forward(x, a, b):
        def layer(x, weights):
            return jnp.tanh(x @ weights[0] @ weights[1]), None

        return jax.lax.scan(layer, x, (a, b))[0]

    return compiled_text(
        forward,
        ((8, 16), P('data', None)),
        ((7, 16, 32), P(None, None, 'model')),
        ((7, 32, 16), P(None, 'model', None)),
    )


def check_scanned(program):
    """2 of 8 rows per device, 16 columns of f32: 128 bytes, summed over 2 devices, in 7 layers."""
    (one,) = program.collectives
    assert one[:-1] == ('all-reduce', 2 * 16 * 4, 2, 'model', 7)
    assert 'while' in one.source
    assert one.network_bytes == 7 * 2 * (1 / 2) * 128
    assert not program.remarks


def test_a_collective_in_a_loop_counts_as_often_as_the_loop_runs(scanned):
    assert scanned.count(' all-reduce(') == 1
    check_scanned(collectives.read(scanned, 4, 2))


def test_without_xlas_note_the_trip_count_follows_from_the_condition(scanned):
    note = '"known_trip_count":{"n":"7"}'
    assert note in scanned
    check_scanned(collectives.read(scanned.replace(note, '"other":{}'), 4, 2))


LOOP = """
%body (p: (u32[], f32[4])) -> (u32[], f32[4]) {
  %p = (u32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[4]{0:T(128)} get-tuple-element(%p), index=1
  %two = u32[] constant(2)
  %next = u32[]{:T(128)} add(%i, %two)
  %moved = f32[4]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  ROOT %t = (u32[]{:T(128)}, f32[4]{0:T(128)}) tuple(%next, %moved)
}

%cond (q: (u32[], f32[4])) -> pred[] {
  %limit = u32[] constant(8)
  %q = (u32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %one = u32[] constant(1)
  %copied = u32[]{:T(128)} copy(%one)
  %start = (u32[]{:T(128)}, f32[4]{0:T(128)}) tuple(%copied, %a)
  %while.1 = (u32[]{:T(128)}, f32[4]{0:T(128)}) while(%start), condition=%cond, body=%body
  ROOT %y = f32[4]{0} get-tuple-element(%while.1), index=1
}
"""


def test_loops_that_start_late_and_step_wide():
    """1, 3, 5, 7: four iterations."""
    (one,) = collectives.read(LOOP, 1, 2).collectives
    assert (one.kind, one.size, one.axis, one.times) == ('collective-permute', 16, 'model', 4)


def test_a_loop_of_unknown_length_is_named():
    program = collectives.read(LOOP.replace('direction=LT', 'direction=NE'), 1, 2)
    assert program.collectives[0].times == 1
    assert program.remarks == ('loop while.1: trip count unknown, counted once',)


ASYNC = """
%begin (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  %g.1 = f32[8]{0} all-gather(%p), channel_id=3, replica_groups=[1,2]<=[2], dimensions={0}
  ROOT %s = f32[8]{0} custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  ROOT %g.2 = f32[8]{0} all-gather(%p), channel_id=3, replica_groups=[1,2]<=[2], dimensions={0}
}

ENTRY %main (x: f32[4]) -> f32[8] {
  %x = f32[4]{0} parameter(0)
  %a = f32[8]{0} fusion(%x), kind=kCustom, calls=%begin
  ROOT %b = f32[8]{0} fusion(%x), kind=kCustom, calls=%beside
}
"""


def test_an_asynchronous_collective_counts_where_it_starts():
    (one,) = collectives.read(ASYNC, 1, 2).collectives
    assert one == collectives.Collective('all-gather', 32, 2, 'model', 1)


@pytest.mark.parametrize(
    ('text', 'groups'),
    [
        ('{}, more', [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ('{{0,1},{2,3},{4,5},{6,7}}, more', [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ('[4,2]<=[8], more', [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ('[2,4]<=[4,2]T(1,0), more', [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=4,'b'=2] {'b'}, more", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=4,'b'=2] {'a'}, more", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (
            "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, more",
            [[0, 2, 4, 6], [1, 3, 5, 7]],
        ),
    ],
)
def test_groups_of_devices_in_every_form_that_xla_writes(text, groups):
    np.testing.assert_array_equal(collectives.replica_groups(text, 8), groups)


def test_groups_of_another_form_are_not_guessed():
    assert collectives.replica_groups("mesh['a'=4,'b'=2] {'a':(1)2}", 8) is None


def test_sends_by_kind():
    """Each of eight devices sends 7/8 of the full array, and twice that for an all-reduce."""
    sent = {
        k: collectives.Collective(k, 800, 8, 'data', 3).network_bytes for k in collectives.KINDS
    }
    assert sent == {
        'all-gather': 2100, 'all-reduce': 4200, 'reduce-scatter': 2100, 'all-to-all': 2100,
        'collective-permute': 2400,
    }  # fmt: skip


def test_operands_are_read_past_layouts():
    module = hlo.parse(LOOP)
    loop = module.instructions['while.1']
    assert loop in module.computations[module.entry]
    assert loop.operands() == ['start'] and hlo.callees(loop) == ['body']


COPIES = """
%fused (p: f32[4,8]) -> f32[8,4] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %turned = f32[8,4]{1,0} transpose(%p), dimensions={1,0}
}

%within (p: f32[4,8]) -> f32[] {
  %p = f32[4,8]{1,0} parameter(0)
  %copy.9 = f32[4,8]{0,1} copy(%p)
  ROOT %sum = f32[] reduce(%copy.9), dimensions={0,1}
}

ENTRY %main (a: f32[4,8]) -> f32[] {
  %a = f32[4,8]{1,0} parameter(0)
  %copy.1 = bf16[64,8]{1,0:T(8,128)(2,1)} copy(%a), metadata={op_name="cache.k"}
  %copy.2 = f32[4,8]{1,0:T(8,128)S(1)} copy(%a)
  %start = (f32[4,8]{1,0}, f32[4,8]{1,0:T(8,128)S(1)}, u32[]) copy-start(%copy.2)
  %transpose_fusion = f32[8,4]{1,0} fusion(%a), kind=kLoop, calls=%fused
  ROOT %y = f32[] fusion(%a), kind=kLoop, calls=%within
}
"""


def test_copies_in_main_memory():
    """Excludes copies fused into other operations and copies to on-chip memory."""
    assert hlo.copies(hlo.parse(COPIES)) == (
        hlo.Copy('bf16[64,8]', 1024, 'cache.k'),
        hlo.Copy('f32[4,8]', 128, 'start'),
        hlo.Copy('f32[8,4]', 128, 'transpose_fusion'),
    )
