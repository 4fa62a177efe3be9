"""The parts of the comparison that could be wrong without failing; nothing here is compiled."""

import dataclasses
import json

import numpy as np
import pytest

from decoding import model
from decoding.drafts import adapter
from decoding.drafts.early_exit import Adapter
from decoding.generate import Metrics
from experiments.decoding_models import Loaded
from experiments.speculative import config as config_lib
from experiments.speculative import drafters, drawing, measure, prompts, results
from lm.model import params, presets
from tokenization.vocabularies.byte import ByteTokenizer

CONFIG = dataclasses.replace(presets.tiny(257), d_model=16, d_ff=16)
TARGET = model.transformer(CONFIG, params.abstract(CONFIG), bos=256)
LOADED = Loaded(TARGET, CONFIG, ByteTokenizer())
PARTS = drafters.Parts(TARGET, TARGET, 1, Adapter(adapter.model(CONFIG), {}), 3)


@pytest.mark.parametrize('name', drafters.NAMES)
def test_every_drafter_fills_every_budget_and_keeps_every_length(name):
    for budget in (6, 10, 14, 21, 30):
        made = drafters.of_budget(name, PARTS, budget)
        assert made.method.nodes == budget + 1
    for length in (2, 3, 4, 5):
        made = drafters.of_length(name, PARTS, length, width=4).method
        alone = name in ('chain', 'early_exit', 'early_exit_adapter')
        assert (made.depth, made.nodes) == (length, 1 + length * (1 if alone else 4))


def test_a_drafter_that_cannot_be_made_says_what_is_missing():
    without = PARTS._replace(draft=None, adapter=None)
    for name in drafters.WITH_DRAFT_MODEL:
        with pytest.raises(ValueError, match='draft model'):
            drafters.of_budget(name, without, 6)
    with pytest.raises(ValueError, match='adapter'):
        drafters.of_budget('early_exit_adapter', without, 6)
    with pytest.raises(ValueError, match='no factors for a budget of 7'):
        drafters.of_budget('recursive_branching', PARTS, 7)


def metrics(tokens, rounds, rates, seconds=1.0):
    efficiency = tokens / rounds
    return Metrics(tokens, rounds, efficiency, efficiency / 2, rates, rates, 0.0, seconds, 0)


def test_calls_are_pooled_by_what_they_counted():
    # of 10 walks, 5 reach depth 1 and 5 depth 2; of 30, none: no walk counts for its second rate
    calls = [metrics(20, 10, (0.5, 1.0)), metrics(30, 30, (0.0, 0.0))]
    rates, walks = measure.acceptance(calls)
    np.testing.assert_allclose(rates, [5 / 40, 1])
    np.testing.assert_allclose(walks, [40, 5])
    plain = measure.Run([metrics(50, 50, (), seconds=5.0)])
    one = measure.summary([[(plain, measure.Run(calls))]])
    assert one['block_efficiency'] == 50 / 40 and one['memory_bound_speedup'] == 25 / 40
    assert one['tokens_per_s'] == 25 and one['speedup'] == 2.5
    assert one['acceptance'] == pytest.approx(10 / 45)
    # the residuals tokens - efficiency * rounds are 7.5 and -7.5
    assert one['block_efficiency_error'] == pytest.approx(np.hypot(7.5, 7.5) / 40)


def question(category, text='What is it?'):
    return json.dumps({'question_id': 1, 'category': category, 'turns': [text, 'And then?']})


def test_spec_bench_has_six_tasks_and_keeps_the_end_of_long_questions(tmp_path):
    file = tmp_path / 'question.jsonl'
    lines = [question(c) for c in (*prompts.MT_BENCH, *prompts.TASKS[1:])]
    file.write_text('\n'.join([*lines, question('rag', 'x' * 50 + 'the end')]) + '\n')
    tasks = prompts.encode_questions(prompts.read_questions(file), LOADED, count=3, tokens=12)
    assert tuple(tasks) == prompts.TASKS
    assert len(tasks['mt_bench']) == 3 and len(tasks['qa']) == 1
    assert tasks['qa'] == [[256, *b'What is it?']]
    assert tasks['rag'][-1] == [256, *b'xxxxthe end']
    for bad in ('{', '[]', '{"category": "qa"}', question('poems'), question('qa', '')):
        file.write_text('\n'.join([lines[0], bad]))
        with pytest.raises(ValueError, match='line 2'):
            prompts.read_questions(file)


def test_held_out_prompts_are_beginnings_of_one_length():
    documents = [b'short', b'long enough', b'long enough too']
    (rows,) = prompts.held_out(documents, LOADED, count=2, tokens=8).values()
    assert sorted(rows) == [[256, *b'long en'], [256, *b'long en']]
    with pytest.raises(ValueError, match='2 documents'):
        prompts.held_out(documents, LOADED, count=3, tokens=8)


def row(drafter, efficiency, error=0.1, size=6):
    cell = measure.Cell(drafter, 'budget', size, 10, 1)._asdict()
    numbers = dict.fromkeys(results.METRICS, 1.0)
    measured = {'block_efficiency': efficiency, 'block_efficiency_error': error}
    return {**cell, 'temperature': 0.3, **numbers, **measured}


def test_claims_say_what_was_not_shown():
    rows = [row('chain', 2.0), row('iid', 2.5), row('recursive', 2.3), row('chain', 9.0, size=14)]
    lines = results.claims(rows)
    assert len(lines) == 2
    assert lines[0].startswith('budget 6, temperature 0.3: NOT SHOWN') and 'RSD-S' in lines[0]
    assert ': shown' in lines[1] and 'within' not in lines[1]
    assert 'within the error' in results.claims([row('chain', 2.0), row('iid', 2.1)])[0]


def test_keys_are_those_of_the_issue():
    keys = results.flat([row('chain', 2.0), {**row('iid', 2.0), 'ratio': 50}], main=10)
    assert keys['block_efficiency/chain/budget=6/temperature=0.3/batch=1'] == 2.0
    assert 'speedup/iid/budget=6/temperature=0.3/batch=1/draft=50' in keys


def test_a_drawn_tree_has_no_two_nodes_in_one_place():
    parent = np.array([-1, 0, 0, 1, 1, 2])
    depth = np.array([0, 1, 1, 2, 2, 2])
    one = drawing.Round(np.arange(6), parent, depth, [0, 1, 4], 7, [])
    heights = drawing._heights(one)
    assert len(set(zip(depth.tolist(), heights.tolist()))) == 6
    assert heights[3] > heights[4] > heights[5] and heights[1] == heights[3:5].mean()


def test_settings_that_cannot_work_are_refused():
    for field, value in (
        ('drafters', ('eagle',)), ('temperatures', (-0.5,)), ('budgets', (0,)),
        ('draft_bundles', ('somewhere',)), ('budgets', (7,)), ('new_tokens', 500),
        ('greedy_draft_temperature', 0.0), ('exit_layers', 4), ('prompt_tokens', 1),
        ('temperatures', ()), ('batches', ()), ('sweep_budget', 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f'--{field}'):
            config_lib.Config(**{field: value})
    with pytest.raises(ValueError, match='--draft_bundles'):
        config_lib.Config(target_bundle='somewhere')


def test_the_draft_models_of_every_scale_have_the_sizes_they_are_named_for():
    for scale in ('demo', 'cpu', 'gpu'):
        settings = config_lib.SCALES[scale]
        vocab_size = 257 if settings.tokenizer == 'bytes' else settings.vocab_size + 1
        sizes = {
            name: params.count(dataclasses.replace(getattr(settings, name), vocab_size=vocab_size))
            for name in ('target', 'draft_4', 'draft_10', 'draft_50')
        }
        for ratio in (4, 10, 50):
            assert sizes['target'] / sizes[f'draft_{ratio}'] == pytest.approx(ratio, rel=0.15)
