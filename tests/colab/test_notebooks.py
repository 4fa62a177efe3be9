"""Every notebook runs from its first cell to its last, at a tiny scale."""

import os
import pathlib

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'colab'


@pytest.mark.slow  # each is an experiment of half a minute or more
@pytest.mark.parametrize('path', sorted(FOLDER.glob('*.ipynb')), ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv('TESSERA_SCALE', 'tiny')
    monkeypatch.setenv('TESSERA_OUT', str(tmp_path))
    packages = [str(FOLDER.parent), os.environ.get('PYTHONPATH', '')]  # whatever is installed
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, packages)))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, resources={'metadata': {'path': str(FOLDER)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
    assert any('image/png' in output.get('data', {}) for output in outputs)
