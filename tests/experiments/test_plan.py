"""The planner: hand-computed costs, sweeps, compiler errors, and output."""

import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import pytest

from experiments import run
from experiments.plan import chips, compile, costs, hlo, ring, steps, sweep, tables
from experiments.plan.collectives import Program
from experiments.plan.config import Config
from lm.devices import mesh as mesh_lib
from lm.model import params, presets

GRID = 'data=4,model=2'


def grid():
    return mesh_lib.make(GRID, jax.devices('cpu')[:8])


def test_matrices_on_one_device_cost_what_the_model_costs():
    """On a single device, only recomputation repeats work."""
    model = presets.llama3_8b()
    mesh = mesh_lib.abstract(1, 1)
    counted = costs.count(model, 4, 2048, 'train', mesh)
    norms = (
        2 * (2 * model.n_layers + 1) * model.d_model
    )  # not matrices, and counted by lm.model.params
    tokens = 4 * 2048
    forward = params.flops_per_token(model, 2048) - norms
    assert counted.device_flops == pytest.approx(4 * forward * tokens, rel=1e-9)
    assert counted.model_flops == 3 * params.flops_per_token(model, 2048) * tokens
    assert set(counted.network_bytes.values()) == {0}


@pytest.mark.parametrize('step', ['train', 'decode'])
@pytest.mark.parametrize('shape', [(8, 1), (4, 2), (1, 8)])
def test_devices_share_the_work(step, shape):
    """Llama 3's 8 KV heads, 32 heads and 14,336 channels divide by 8: no work is replicated."""
    model = presets.llama3_8b()
    one = costs.count(model, 16, 2048, step, mesh_lib.abstract(1, 1))
    cut = costs.count(model, 16, 2048, step, mesh_lib.abstract(*shape))
    assert cut.device_flops == pytest.approx(one.device_flops / 8, rel=1e-9)
    assert cut.model_flops == one.model_flops
    assert [axis for axis, sent in cut.network_bytes.items() if sent > 0] == [
        axis for axis, size in zip(('data', 'model'), shape, strict=True) if size > 1
    ]


def test_sequences_share_the_work_and_the_matrices():
    """As with `data`, apart from ring attention; one row is enough for eight devices."""
    model = presets.llama3_8b()
    one = costs.count(model, 1, 8192, 'train', mesh_lib.abstract(1))
    cut = costs.count(model, 1, 8192, 'train', mesh_lib.abstract(1, sequence=8))
    assert cut.device_flops == pytest.approx(one.device_flops / 8, rel=1e-9)
    by_rows = costs.count(model, 8, 8192, 'train', mesh_lib.abstract(8))
    # gathers are the same; input embeddings are those of 1/8 as many tokens
    tokens = 8192 * model.d_model * 7 / 8 * 6
    matrices = by_rows.network_bytes['data'] - tokens
    assert cut.network_bytes['sequence'] == pytest.approx(matrices + tokens / 8, rel=1e-9)
    mesh = mesh_lib.abstract(1, sequence=8)
    step = steps.make(Config(batch=1, length=8192, mesh='data=1'), model, mesh)
    assert costs.bytes_per_device(step.parts['params']) < 4 * params.count(model) / 7.9


def test_what_rings_send():
    """2 heads of 4 channels in bf16, 10 tokens per device: 160 bytes of queries, 320 in f32."""
    sizes = {'tokens': 10.0, 'heads': 2, 'head_dim': 4, 'itemsize': 2, 'flops': 1.0}
    forward, backward = ring.passes('keys', 4, kv_heads=1, **sizes)
    assert forward[3:] == (3 * 160, 0) and backward[3:] == (3 * 160 + 4 * 320, 0)
    forward, backward = ring.passes('queries', 4, kv_heads=1, **sizes)
    # results (160 bytes) and LSE (80) return over 1 and 2 hops; those 3 hops away go on by 1 hop
    assert forward[3:] == (3 * 160 + 240, 3 * 240)
    assert backward[3:] == (3 * 2 * 240 + 160, 3 * 160)


def test_whole_copies_have_their_gradients_summed():
    """Gemma 3's width is not divisible by 512: each device holds all 27 billion parameters."""
    model = presets.gemma3_27b()
    sent = costs.count(model, 512, 1024, 'train', mesh_lib.abstract(512, 1)).network_bytes
    bf16_all_reduce = 2 * 2 * params.count_body(model)
    assert sent['data'] > 0.99 * bf16_all_reduce


def test_decoding_reads_every_weight_and_the_whole_cache_once():
    """With a long cache and a wide batch these dominate: 4 bytes of position per 512 of K and V."""
    model = presets.llama3_8b()
    config = Config(step='decode', batch=256, length=32_768, mesh='data=1')
    mesh = mesh_lib.abstract(1, 1)
    body = steps.model_config(config)
    parts = steps.make(config, body, mesh).parts
    read = costs.count(body, 256, 32_768, 'decode', mesh).hbm_bytes
    held = costs.bytes_per_device(parts)
    assert held == pytest.approx(
        2 * params.count(model) + 256 * 32 * 8 * 32_768 * (2 * 128 * 2 + 4) + 256 * 4
    )
    # only the looked-up rows of the input table are read
    table = 2 * model.vocab_size * model.d_model
    assert read == pytest.approx(held - table, rel=0.01)


def test_moments_are_kept_like_parameters():
    config = Config('tiny', 'cpu:8', batch=8, length=32)
    step = steps.make(config, steps.model_config(config), mesh_lib.abstract(4, 2))
    kept = {name: costs.bytes_per_device(part) for name, part in step.parts.items()}
    counters = 3 * 4  # at most: those of optax's schedule, AdamW and the chain
    assert 0 <= kept['optimizer'] - 2 * kept['params'] <= counters
    assert kept['params'] < 4 * params.count(presets.tiny()) / 4


@pytest.mark.parametrize('step', ['train', 'decode'])
def test_what_stays_on_the_devices_is_what_the_compiled_step_takes(step):
    config = Config('tiny', 'cpu:8', step, batch=8, length=32, mesh=GRID)
    mesh = grid()
    made = steps.make(config, steps.model_config(config), mesh)
    result = compile.compile_step(made, mesh, 'tiny')
    assert isinstance(result, compile.Compiled)
    kept = sum(costs.bytes_per_device(part) for part in made.parts.values())
    batch = 8 * 32 * 5 * 4 / 4 if step == 'train' else 8 * 4 / 4
    assert result.arguments == pytest.approx(kept + batch, abs=64)
    assert {'data', 'model'} <= {one.axis for one in result.program.collectives}
    assert not result.program.remarks


def test_every_mesh_is_tried_and_the_fastest_that_fits_comes_first():
    config = Config('llama3_8b', 'v5e:4x4', 'decode', batch=16, sweep=True, batches=(16, 64, 4096))
    found = sweep.choices(config)
    meshes = {(choice.mesh.data, choice.mesh.model) for choice in found}
    assert meshes == {(16, 1), (8, 2), (4, 4), (2, 8), (1, 16)}
    assert len(found) == 15
    fitting = [choice for choice in found if choice.fits]
    assert fitting and len(fitting) < len(found) and found[: len(fitting)] == fitting
    best = min(choice.seconds_per_token for choice in fitting)
    assert found[0].seconds_per_token == pytest.approx(best, rel=0.02)
    assert all(c.memory.total > chips.parse('v5e:4x4').chip.hbm_bytes for c in found if not c.fits)


def test_rows_that_do_not_divide_are_left_out():
    config = Config('tiny', 'cpu:8', batch=4, length=32, sweep=True, batches=(4,))
    assert {choice.mesh.data for choice in sweep.choices(config)} == {1, 2, 4}


def test_bandwidth_of_an_axis():
    """Both sides of 4x4 carry an axis of 16; 16 x 16 closes into rings, which send both ways."""
    link = chips.parse('v5e:4x4').chip.link_bandwidth
    assert chips.axis_bandwidth(chips.parse('v5e:4x4'), {'data': 16, 'model': 1}) == {
        'data': 2 * link, 'model': link,
    }  # fmt: skip
    assert chips.axis_bandwidth(chips.parse('v5e:16x16'), {'data': 16, 'model': 16}) == {
        'data': 2 * link, 'model': 2 * link,
    }  # fmt: skip


def test_the_largest_slices_are_known():
    for chip in chips.CHIPS:
        largest = chips.Topology(chip, chip.largest)
        assert len(chip.largest) == chip.dimensions and chips.parse(largest.name) == largest
    assert chips.parse('v4:4x4x256').devices == 4096  # cubes can be joined in any shape


@pytest.mark.parametrize(
    ('arguments', 'code', 'line'),
    [
        (['--preset', 'llama9'], 2, "--preset 'llama9': there are tiny, m1_3m"),
        (['--topology', 'v9:2x2'], 2, "unknown chip 'v9'; there are v4, v5e, v5p, v6e, cpu"),
        (['--topology', 'v5p:2x2'], 2, 'v5p slices are written v5p:SIDExSIDExSIDE'),
        (['--batch', '6', '--mesh', 'data=4,model=2'], 2, '--batch 6: expected a multiple of the'),
        (['--batch', '6'], 2, '--batch 6: expected a multiple of the data=8 devices'),
        (['--mesh', 'data=3,model=2'], 2, 'data=3 x model=2, but 8 devices'),
        (['--mesh', 'sequence=2', '--step', 'decode'], 2, 'expected sequence=1'),
        (['--mesh', 'sequence=8', '--length', '40'], 2, '40 tokens over sequence=8 devices'),
        (['--length', '4096'], 2, '--length 4096: tiny has 128 positions'),
        (['--sweep', '--mesh', 'data=8'], 2, '--sweep tries every mesh'),
        (['--topology', 'v5e:32x32'], 2, 'the largest v5e slice is v5e:16x16, 256 devices'),
        (['--topology', 'v6e:8x32'], 2, 'the largest v6e slice is v6e:16x16, 256 devices'),
        (['--topology', 'v5p:20x20x28'], 2, 'v5p:16x20x28, 8960 devices'),
    ],
)
def test_errors_are_one_line(arguments, code, line, tmp_path, capsys):
    base = ['plan', '--scale', 'tiny', '--abstract', '--out', str(tmp_path)]
    try:
        assert run.main([*base, *arguments]) == code
    except SystemExit as caught:  # tyro before 0.9 reports what a config refuses itself
        assert caught.code == code
    shown = capsys.readouterr().err.replace('│', ' ')  # tyro before 0.9 draws a box around it
    assert line in ' '.join(shown.split())


def test_without_libtpu_the_error_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.delenv('TPU_LIBRARY_PATH', raising=False)
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name, *a: None if name == 'libtpu' else find(name, *a)
    )
    arguments = ['plan', '--scale', 'tiny', '--topology', 'v5e:4x2', '--out', str(tmp_path)]
    assert run.main(arguments) == 1
    assert 'libtpu, is not installed: make tpu' in capsys.readouterr().err


def test_too_few_devices_once_arrays_lie_on_them():
    alive = jnp.ones(())
    with pytest.raises(ValueError, match='JAX_NUM_CPU_DEVICES=64'):
        compile.devices(chips.parse('cpu:64'))
    assert alive == 1


def test_what_does_not_fit_is_an_answer(tmp_path, capsys):
    arguments = ['plan', '--abstract', '--preset', 'gemma3_27b', '--out', str(tmp_path)]
    assert run.main(arguments) == 0
    assert 'does not fit: ' in capsys.readouterr().out
    assert json.loads((tmp_path / 'result.json').read_text())['fits/step'] == 0


def test_a_refusal_for_memory_says_how_much():
    text = (
        'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. '
        'Exceeded hbm capacity by 4.75G.\nmore'
    )
    refused = compile.refused(RuntimeError(text), 1.0)
    assert refused.total == 20.5 * 2**30 and '\n' not in refused.reason
    blocks = RuntimeError('RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.\nmore')
    with pytest.raises(ValueError, match=r'vmem\.$'):
        compile.refused(blocks, 1.0)


# error of libtpu 0.0.42 for a kernel whose blocks are too large; its long middle is removed
VMEM = (
    'RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\n'
    'Ran out of memory in memory space vmem while allocating on stack for %tree.1 = '
    '(bf16[1,8,4096,128]{3,2,1,0:T(8,128)(2,1)S(1)}, f32[1,8,1,4096]{3,2,1,0:T(1,128)S(1)}) '
    'custom-call(%max.1, /*index=5*/%bitcast.56), custom_call_target="tpu_custom_call", '
    'frontend_attributes={kernel_metadata={}}, metadata={op_name="jit(tree)/tree/pallas_call" '
    'stack_frame_id=95}. Scoped allocation with size 68.94M and limit 48.00M exceeded scoped vmem '
    'limit by 20.94M. It should not be possible to run out of scoped vmem - \n'
    'See https://openxla.org/xla/errors/error_1001 for more details.'
)


def test_a_refusal_says_what_ran_out_though_a_code_stands_above_it():
    with pytest.raises(ValueError, match=r'^Ran out .* vmem .* for %tree\.1: Scoped .* 68\.94M'):
        compile.refused(RuntimeError(VMEM), 1.0)
    text = 'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom:\nRan out of memory in hbm. Used 2G of 1G.'
    assert compile.refused(RuntimeError(text), 1.0).total == 2 * 2**30
    other = 'RESOURCE_EXHAUSTED: E9: Other:\n\nToo little of something.\nSee there.'
    with pytest.raises(ValueError, match=r'^E9: Other: Too little of something\.$'):
        compile.refused(RuntimeError(other), 1.0)


@pytest.mark.parametrize(('times', 'said'), [(1.2, False), (3.0, True)])
def test_memory_far_above_the_counted_is_said_with_its_copies(times, said, capsys):
    counted = costs.Memory(2**30, 0, 0, 0, 0)
    copies = (hlo.Copy('bf16[1024,2048,128]', 2**29, 'cache.k'), hlo.Copy('f32[8]', 32, 'x'))
    result = compile.Compiled(2**30, (times - 1) * 2**30, 0, Program((), ()), copies, 1.0)
    tables.memory(counted, result, chips.parse('v5e:2x2'))
    printed = ' '.join(capsys.readouterr().out.split())
    line = '2 GiB more than estimated, 3 times as much: something is off; its largest copies: '
    assert (line + 'bf16[1024,2048,128], 0.5 GiB (cache.k)' in printed) == said
    assert 'f32[8]' not in printed and ('something is off' in printed) == said


@pytest.mark.parametrize('step', ['train', 'decode'])
def test_tables_without_compiling(step, tmp_path, capsys):
    arguments = ['plan', '--scale', 'tiny', '--abstract', '--step', step, '--out', str(tmp_path)]
    assert run.main(arguments) == 0
    printed = capsys.readouterr().out
    assert 'cpu has' in printed and 'compiled ' not in printed
    leaves = {'train': ['optimizer.mu', 'optimizer.nu', 'batch.targets'],
              'decode': ['cache.k_NBKSC', 'batch.tokens']}  # fmt: skip
    assert all(leaf in printed for leaf in leaves[step])


def test_tables_of_cut_sequences(tmp_path, capsys):
    arguments = ['plan', '--scale', 'tiny', '--abstract', '--mesh', 'data=2,sequence=4']
    assert run.main([*arguments, '--ring', 'queries', '--out', str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert 'Ring attention' in printed and 'By devices along sequence' in printed
    metrics = json.loads((tmp_path / 'result.json').read_text())
    held = [metrics[f'bytes_per_device/growth/sequence={n}'] for n in (1, 2, 4)]
    assert held == sorted(held, reverse=True) and held[2] < 0.5 * held[0]


def test_a_sweep_at_tiny_scale(tmp_path, capsys):
    arguments = ['plan', '--scale', 'tiny', '--sweep', '--abstract', '--out', str(tmp_path)]
    assert run.main(arguments) == 0
    assert 'best: --mesh data=' in capsys.readouterr().out


def test_a_sweep_saves_its_plot_and_names_the_best(tmp_path, capsys):
    arguments = ['plan', '--abstract', '--sweep', '--step', 'decode', '--out', str(tmp_path)]
    assert run.main(arguments) == 0
    assert 'best: --mesh data=' in capsys.readouterr().out
    metrics = json.loads((tmp_path / 'result.json').read_text())
    assert math.prod(metrics[f'best/{axis}'] for axis in mesh_lib.AXES) == 16
    assert all(math.isfinite(value) for value in metrics.values())
    assert (tmp_path / 'sweep.png').read_bytes().startswith(b'\x89PNG')
