"""The runner: the files that it writes, and its error messages."""

import importlib.metadata
import json
import subprocess
import sys
import textwrap

import pytest

import experiments
from experiments import run
from lm.files import provenance

CONFIG = '''
"""Adds numbers.

Command: python -m experiments.run NAME
"""
import dataclasses

import tyro


@dataclasses.dataclass(frozen=True)
class Model:
    """The body."""

    width: int = 4
    """channels"""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to add."""

    file: tyro.conf.Positional[str]
    """the file to read"""
    model: Model = Model()
    second: Model | None = None
    steps: int = 10
    """how often"""
    verbose: bool = False

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f'--steps {self.steps}: want at least 0')


SCALES = {'demo': Config('none'), 'big': Config('none', Model(8), steps=1000)}
'''
MAIN = """
def main(config, out):
    (out / 'model.txt').write_text('x')
    return {'width/big': config.model.width, 'steps/b': config.steps}
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Returns a function that writes a temporary experiment and returns its name."""
    folder = tmp_path / 'found'
    monkeypatch.setattr(experiments, '__path__', [*experiments.__path__, str(folder)])
    monkeypatch.chdir(tmp_path)
    made = []

    def write(main=MAIN, config=CONFIG, name=f'adding_{tmp_path.name}'):
        (folder / name).mkdir(parents=True)
        (folder / name / '__init__.py').write_text('')
        (folder / name / 'config.py').write_text(config.lstrip())
        (folder / name / 'main.py').write_text(textwrap.dedent(main))
        made.append(name)
        return name

    yield write
    for module in [m for m in sys.modules if m.split('.')[1:2] and m.split('.')[1] in made]:
        del sys.modules[module]


def test_writes_config_and_result(make, tmp_path):
    name = make()
    assert run.main([name, 'f.txt', '--steps', '3', '--model.width', '5']) == 0
    out = tmp_path / 'out' / f'{name}-demo'
    assert json.loads((out / 'result.json').read_text()) == {'steps/b': 3, 'width/big': 5}
    written = json.loads((out / 'config.json').read_text())
    fields = {'file': 'f.txt', 'model': {'width': 5}, 'second': None, 'steps': 3, 'verbose': False}
    assert written['config'] == fields
    assert (written['experiment'], written['scale']) == (name, 'demo')
    assert {'commit', 'dirty', 'jax', 'python', 'numpy', 'device', 'device_count'} <= set(written)
    assert sorted(p.name for p in out.iterdir()) == ['config.json', 'model.txt', 'result.json']


@pytest.mark.parametrize('flags', [['--scale', 'big'], ['--scale=big']])
def test_scale_gives_the_defaults_and_fields_override_them(make, tmp_path, flags):
    assert run.main([make(), 'f.txt', *flags, '--out', str(tmp_path / 'o'), '--verbose']) == 0
    written = json.loads((tmp_path / 'o' / 'config.json').read_text())
    assert written['config']['steps'] == 1000
    assert written['config']['model'] == {'width': 8}
    assert written['config']['verbose'] is True


def test_no_arguments_lists_the_experiments(make, capsys):
    name = make()
    assert run.main([]) == 2
    listed = capsys.readouterr().out
    assert f'{name}  Adds numbers.\n' in listed + '\n'
    assert run.main(['--help']) == 0


def test_unknown_name_suggests_a_near_one(make, capsys):
    name = make()
    assert run.main([name[:-1] + 'x']) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: no experiment') and name in error
    assert error.count('\n') == 1


def test_unknown_scale_names_those_that_exist(make, capsys):
    assert run.main([make(), 'f', '--scale', 'huge']) == 2
    assert "no scale 'huge'; there are: demo, big" in capsys.readouterr().err


@pytest.mark.parametrize('arguments', [['f', '--nope', '3'], ['f', '--steps', 'many']])
def test_wrong_flags_are_usage_errors(make, capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        run.main([make(), *arguments])
    assert caught.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_help_shows_fields_their_docstrings_and_the_scales(make, capsys):
    with pytest.raises(SystemExit) as caught:
        run.main([make(), '--help', '--scale', 'big'])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for text in ('Adds numbers.', 'the file to read', 'how often', '1000', '{demo,big}', '--out'):
        assert text in shown


@pytest.mark.parametrize(
    ('body', 'line'),
    [
        ("raise ValueError('a.txt: line 3\\n  is odd')", 'error: a.txt: line 3 is odd\n'),
        ("open('missing.txt')", 'error: missing.txt: No such file or directory\n'),
        (
            "raise OSError(28, 'No space left on device', 'x')",
            'error: x: No space left on device\n',
        ),
        ('import torch_is_missing_here', None),
        ("raise RuntimeError('a bug')", None),
        ("raise ModuleNotFoundError(name='nbclient')", "pip install -e '.[colab]'"),
        (
            "raise ImportError('Please install gcsfs to')",
            'error: gs:// paths need the module gcsfs',
        ),
        ("raise ModuleNotFoundError(name='torch')", 'error: PyTorch is not installed: make torch'),
        ('raise KeyboardInterrupt', 'interrupted; run the same command again to resume\n'),
    ],
)
def test_user_errors_are_one_line_and_bugs_keep_their_traceback(
    make, capsys, monkeypatch, body, line
):
    needs = ['jax>=0.10', 'nbclient>=0.10; extra == "colab"', 'nbclient; extra == "test"']
    monkeypatch.setattr(importlib.metadata, 'requires', lambda name: needs)
    name = make(f'def main(config, out):\n    {body}\n')
    if line is None:
        with pytest.raises((RuntimeError, ModuleNotFoundError)):
            run.main([name, 'f'])
        return
    assert run.main([name, 'f']) == (130 if 'Keyboard' in body else 1)
    error = capsys.readouterr().err
    assert line in error and error.count('\n') == 1


def test_traceback_on_request(make, monkeypatch):
    monkeypatch.setenv(run.TRACEBACK, '1')
    with pytest.raises(ValueError, match='odd'):
        run.main([make("def main(config, out):\n    raise ValueError('odd')\n"), 'f'])


def test_a_value_that_the_config_refuses(make, capsys):
    try:
        code = run.main([make(), 'f', '--steps', '-1'])
    except SystemExit as caught:  # tyro before 0.9 reports the error itself
        code = caught.code
    assert code == 2
    assert '--steps -1: want at least 0' in capsys.readouterr().err


def test_a_metric_that_is_not_finite_is_named_and_the_others_are_kept(make, tmp_path, capsys):
    name = make("def main(config, out):\n    return {'loss/a': 1.5, 'loss/b': float('nan')}\n")
    assert run.main([name, 'f', '--out', 'o']) == 1
    assert 'not a finite number: loss/b' in capsys.readouterr().err
    assert json.loads((tmp_path / 'o' / 'result.json').read_text()) == {'loss/a': 1.5}


@pytest.mark.parametrize('arguments', [[], ['--help'], ['no_such_experiment'], ['no/such']])
def test_what_needs_no_jax_does_not_import_it(arguments):
    """The list and error messages appear at once, since importing JAX would take a second."""
    program = (
        'import sys; from experiments import run; run.main(sys.argv[1:]); '
        "sys.exit('jax' in sys.modules)"
    )
    command = [sys.executable, '-c', program, *arguments]
    assert subprocess.run(command, capture_output=True, cwd=provenance.ROOT).returncode == 0


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Returns a function that writes an experiment into a folder of its own and gives its path."""
    monkeypatch.setattr(sys, 'path', [*sys.path])
    monkeypatch.chdir(tmp_path)

    def write(path, package=False, **files):
        folder = tmp_path / path
        folder.mkdir(parents=True)
        files = {'config': CONFIG.lstrip(), 'main': textwrap.dedent(MAIN), **files}
        if package:
            files['__init__'] = ''
        for name, text in files.items():
            (folder / f'{name}.py').write_text(text)
        return folder

    yield write
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in str(getattr(module, '__file__', None)):
            del sys.modules[name]


def result_of(tmp_path, name):
    written = json.loads((tmp_path / 'out' / f'{name}-demo' / 'config.json').read_text())
    metrics = json.loads((tmp_path / 'out' / f'{name}-demo' / 'result.json').read_text())
    return written['experiment'], metrics


@pytest.mark.parametrize('package', [False, True])
def test_a_folder_outside_runs_by_its_path(elsewhere, tmp_path, package):
    name = f'doubling_{package}'
    main = f'from {name} import sizes\n\ndef main(config, out):\n    return {{"n": sizes.N}}\n'
    elsewhere(f'theirs/{name}', package, main=main, sizes='N = 3')
    assert run.main([f'theirs/{name}/', 'f.txt']) == 0
    assert result_of(tmp_path, name) == (name, {'n': 3})
    assert sys.path[0] != str(tmp_path / 'theirs')  # siblings hide no installed package


def test_a_package_outside_runs_by_its_dotted_name(elsewhere, tmp_path, monkeypatch):
    folder = elsewhere('theirs_dotted/tripling', package=True)
    (folder.parent / '__init__.py').write_text('')
    monkeypatch.syspath_prepend(tmp_path)
    assert run.main(['theirs_dotted.tripling', 'f.txt', '--steps', '2']) == 0
    expected = 'theirs_dotted.tripling', {'steps/b': 2, 'width/big': 4}
    assert result_of(tmp_path, 'tripling') == expected


@pytest.mark.parametrize(
    ('where', 'line'),
    [
        ('theirs/nothing', 'theirs/nothing: no config.py; an experiment is a folder of'),
        ('theirs/half', 'theirs/half: no main.py; an experiment is a folder of'),
        ('theirs/not-a-name', "a folder called 'not-a-name' cannot be imported"),
        ('theirs/json', 'theirs/json: another module is called json; rename the folder'),
        ('theirs/bare', 'bare/config.py: no SCALES'),
        ('nowhere.at_all', 'no module nowhere.at_all.config; an experiment is a package of'),
        ('json.decoder', 'no module json.decoder.config'),
        ('..', 'no module ...config'),
    ],
)
def test_what_is_no_experiment_outside_is_refused_in_one_line(elsewhere, capsys, where, line):
    elsewhere('theirs/half').joinpath('main.py').unlink()
    elsewhere('theirs/not-a-name')
    elsewhere('theirs/json')
    elsewhere('theirs/bare', config='class Config:\n    pass\n')
    assert run.main([where, 'f.txt']) == 2
    error = capsys.readouterr().err
    assert line in error and error.startswith('error: ') and error.count('\n') == 1


def test_an_import_that_fails_outside_keeps_its_traceback(elsewhere):
    elsewhere('theirs/broken', config='import no_such_module_at_all')
    with pytest.raises(ModuleNotFoundError, match='no_such_module_at_all'):
        run.main(['theirs/broken'])
    elsewhere('theirs/inner', package=True).joinpath('__init__.py').write_text('import missing_x')
    with pytest.raises(ModuleNotFoundError, match='missing_x'):
        run.main(['theirs/inner'])
