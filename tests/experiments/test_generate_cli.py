"""The `generate` command: its output, and the inputs that it refuses before compiling."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from rich.console import Console

from decoding import generate as generate_lib
from experiments import decoding_models, run
from experiments.generate.stream import Painter
from lm.checkpoints import bundle
from lm.devices import mesh
from lm.model import params, presets
from tokenization.vocabularies.bpe import BPETokenizer
from tokenization.vocabularies.byte import ByteTokenizer

TEXT = 'if x is not None and x is not None: '


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Two untrained byte models, and one with another tokenizer of the same size."""
    folder = tmp_path_factory.mktemp('models')
    config = dataclasses.replace(presets.tiny(), n_layers=2, d_model=16, d_ff=16, max_length=64)
    for name, tokenizer, seed in (
        ('target', ByteTokenizer(), 0),
        ('draft', ByteTokenizer(), 1),
        ('other', BPETokenizer(tuple(bytes([i]) for i in range(256))), 1),
    ):
        weights = params.init(config, jax.random.key(seed))
        bundle.save(folder / name, config, weights, tokenizer, 256)
    return folder


def call(models, *arguments, prompt=TEXT):
    bundle_flags = ('--bundle', str(models / 'target'), '--prompt', prompt)
    out = ('--out', str(models / 'run'))
    try:
        return run.main(['generate', *bundle_flags, *map(str, arguments), *out])
    except SystemExit as stop:  # tyro before 0.9 ends the process by itself
        return stop.code


def text_of(printed: str) -> str:
    """Returns the output before the last line, which reports the speed."""
    return printed.removesuffix('\n').rpartition('\n')[0]


def test_a_drafter_changes_the_speed_and_not_the_greedy_text(models, capsys):
    common = ('--max_tokens', 20, '--temperature', 0)
    assert call(models, *common) == 0
    plain = capsys.readouterr().out
    assert plain.startswith(TEXT)
    assert 'block efficiency 1.00: 20 tokens in 20 passes' in plain
    assert call(models, *common, '--drafter', 'lookup', '--nodes', 6) == 0
    drafted = capsys.readouterr().out
    assert text_of(drafted) == text_of(plain)
    result = json.loads((models / 'run' / 'result.json').read_text())
    assert result['tokens/text'] == 20 and result['block_efficiency/text'] >= 1
    assert re.search(r'^\d+ tokens/s, ', drafted.splitlines()[-1])


def test_a_stop_string_ends_the_text_and_the_seed_repeats_it(models, capsys):
    flags = ('--max_tokens', 20, '--seed', 3)
    assert call(models, *flags) == 0
    text = text_of(capsys.readouterr().out)
    letter = next(c for c in text[len(TEXT) :] if c.isascii() and c.isalnum())
    assert call(models, *flags, '--stop', letter) == 0
    stopped = text_of(capsys.readouterr().out)
    assert stopped == TEXT + text[len(TEXT) :].partition(letter)[0] + letter
    assert json.loads((models / 'run' / 'result.json').read_text())['tokens/text'] < 20


BAD = {
    'prompt: empty': {'prompt': ''},
    'max_length': {'prompt': TEXT * 2},
    'nowhere': ('--drafter', 'chain', '--draft', 'nowhere'),
    'give a bundle': ('--drafter', 'recursive'),
    'different tokenizers': ('--drafter', 'chain', '--draft', 'other'),
    'temperature': ('--temperature', -1),
    'temperature: inf': ('--temperature', 'inf'),
    'seed': ('--seed', 99999999999999999999),
    'top_k': ('--top_k', 3000000000),
    'has no draft model': ('--draft', 'draft'),
    'top_p': ('--top_p', 2),
    'tree of 101 nodes': ('--drafter', 'chain', '--draft', 'draft', '--nodes', 100),
    'budget of 7': ('--drafter', 'recursive_branching', '--draft', 'draft', '--nodes', 7),
    'stop string': ('--stop', ''),
    'layers': ('--drafter', 'early_exit', '--exit_layers', 2),
}


@pytest.mark.parametrize('named', BAD)
def test_bad_input_is_one_line_before_anything_compiles(models, named, capsys, monkeypatch):
    for step in ('prefill', 'loop'):
        monkeypatch.setattr(generate_lib.rounds, step, None)  # calling it would be a TypeError
    monkeypatch.chdir(models)
    given = BAD[named]
    flags, settings = ((), given) if isinstance(given, dict) else (given, {})
    status = call(models, '--max_tokens', 20, *flags, **settings)
    captured = capsys.readouterr()
    assert not captured.out
    if status == 2:  # refused by the parser, which prints a box if tyro is older than 0.9
        shown = ' '.join(captured.err.replace('│', ' ').split())
        assert named in shown and len(captured.err.splitlines()) <= 5, captured.err
    else:
        assert status == 1 and captured.err.startswith('error: ')
        assert named in captured.err and captured.err.count('\n') == 1, captured.err


def test_a_bundle_is_loaded_without_the_padding_of_its_tables(models):
    one = mesh.make(devices=jax.devices()[:1])
    loaded = decoding_models.load(models / 'target', one)
    assert loaded.config.vocab_size == 257 == len(loaded.token_bytes())
    assert loaded.model.params['tables']['output_VD'].shape[0] == 257
    assert loaded.encode(b'a') == [256, 97]
    assert loaded.model.tokenizer == decoding_models.load(models / 'draft', one).model.tokenizer


def test_characters_are_printed_whole_and_control_bytes_never():
    text = 'é€😀'.encode()
    for terminal in (False, True):
        console = Console(force_terminal=terminal, highlight=False, color_system='standard')
        painter = Painter(console, [bytes([i]) for i in range(256)])
        with console.capture() as capture:
            printed = []
            console.file.write = printed.append  # type: ignore[method-assign]
            for byte in text + b'\x1b[2J\xc3':
                painter.round(np.array([byte]))
            painter.end()
        shown = ''.join(printed) + capture.get()
        shown = re.sub(r'\x1b\[[\d;]*m', '', shown) if terminal else shown
        assert shown.startswith('é€😀') and shown.endswith('[2J�')
        assert ('\x1b' in shown) == (not terminal)
