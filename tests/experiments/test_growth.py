"""Growth: equal losses on all meshes, the planner's figures unchanged, rows computed once."""

import dataclasses

import pytest

from experiments.growth import fake, main, slices
from experiments.growth.config import SCALES, Config
from experiments.plan import chips, costs, steps
from experiments.plan.config import Config as PlanConfig
from lm.devices import mesh as mesh_lib

TINY = SCALES['tiny']


def test_a_mesh_trains_as_one_device_and_keeps_a_part_of_it():
    config = dataclasses.replace(TINY, meshes=('data=1', 'data=2,model=2'), steps=3)
    make = fake.compiler(config)
    one, four = (fake.row(config, text, make) for text in config.meshes)
    assert one['difference'] == 0 and one['collectives'] == '' and one['sent_bytes'] == 0
    assert four['first_difference'] < 1e-6 and four['difference'] < main.TOLERANCE
    assert four['devices'] == 4
    assert four['kept_bytes'] < 0.27 * one['kept_bytes']
    assert 'all-gather (data)' in four['collectives']
    assert 'all-reduce (model)' in four['collectives'] and four['sent_bytes'] > 0
    assert one['loss'] == pytest.approx(four['loss'], abs=main.TOLERANCE)


def test_slices_are_the_planners_figures(tmp_path, capsys):
    row = slices.row(TINY, 'v5e:4x4', 2, tmp_path)
    assert capsys.readouterr().out == ''
    assert 'Roofline' in (tmp_path / 'plans' / 'v5e_4x4_model_2.txt').read_text()
    assert (row['mesh'], row['chips'], row['tokens']) == ('data=8,model=2', 16, 2 * 16 * 32)
    plan = PlanConfig('tiny', 'v5e:4x4', 'train', 32, 32, row['mesh'])
    body, mesh = steps.model_config(plan), mesh_lib.abstract(8, 2)
    counted = costs.count(body, 32, 32, 'train', mesh)
    cells = slices.summary(row)
    assert cells['counted_sent'] == sum(counted.network_bytes.values())
    assert cells['compute_s'] == counted.device_flops / chips.parse('v5e:4x4').chip.flops
    kept = costs.memory(body, 32, 32, steps.make(plan, body, mesh).parts, mesh).kept
    assert cells['kept_bytes'] == kept
    assert cells['compiled_sent'] is None and cells['collectives'] is None


def test_what_was_compiled_goes_before_what_is_counted(tmp_path):
    row = slices.row(TINY, 'v5e:2x2', 1, tmp_path)
    compiled = {
        'roofline_s/compiled_network': 2.0,
        'bytes_per_device/compiled_total': 5e9,
        'collectives/all-gather/axis=data': 7.0,
        'collective_bytes/all-gather/axis=data': 3e9,
        'collectives/all-reduce/axis=data+model': 1.0,
        'collective_bytes/all-reduce/axis=data+model': 4e9,
    }
    cells = slices.summary(row | compiled)
    assert cells['step_s'] == cells['network_s'] == 2.0 and cells['bound'] == 'network'
    assert cells['compiled_bytes'] == 5e9 and cells['compiled_sent'] == 7e9
    assert cells['collectives'] == 'all-reduce (data+model) 4, all-gather (data) 3'
    assert cells['tokens_per_chip_s'] == 2 * 32 / 2.0


def test_rows_that_are_done_are_not_made_again(tmp_path, monkeypatch, capsys):
    row = {
        'devices': 1, 'first_difference': 0.0, 'difference': 0.0, 'loss': 1.0, 'ms': 2.0,
        'ratio': 1.0, 'kept_bytes': 2**20, 'step_bytes': 2**21, 'sent_bytes': 0.0,
        'collectives': '',
    }  # fmt: skip
    seen = []

    def once(config, text, make):
        seen.append(text)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return row | {'mesh': text}

    monkeypatch.setattr(fake, 'row', once)
    with pytest.raises(KeyboardInterrupt):
        main.main(TINY, tmp_path)
    metrics = main.main(TINY, tmp_path)
    assert seen == ['data=1', 'data=2,model=2', 'data=2,model=2']
    assert metrics['loss_difference/fake/mesh=data=2,model=2'] == 0
    printed = capsys.readouterr().out
    assert 'shown: all losses of 2 steps' in printed and 'v5e:4x4' in printed
    monkeypatch.setattr(slices, 'row', once)  # would raise
    assert main.main(TINY, tmp_path) == metrics


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'slices': ('v9:2',)}, 'unknown chip'),
        ({'model_ways': (3,)}, '--model_ways 3: does not divide the 4'),
        ({'preset': 'gpt9'}, '--preset'),
        ({'repeats': 0}, '--repeats 0'),
        ({'meshes': ()}, '--meshes'),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)
