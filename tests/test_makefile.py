"""Where `make` keeps compiled programs."""

import importlib.metadata
import os
import shutil
import subprocess
import sys

import pytest

from lm.files import provenance

SHOW = 'show: ; @$(KEEP) echo "[$${JAX_COMPILATION_CACHE_DIR-}]"'
CURRENT = '-'.join(importlib.metadata.version(name) for name in ('jax', 'jaxlib'))


def kept(**settings):
    """The folder for compiled programs with these environment variables, or '' for none."""
    unset = {'JAX_COMPILATION_CACHE_DIR', 'XDG_CACHE_HOME', 'MAKEFLAGS', 'MAKELEVEL'}
    environment = {k: v for k, v in os.environ.items() if k not in unset} | settings
    binaries = os.path.dirname(sys.executable)
    command = ['make', '--no-print-directory', '--eval', SHOW, 'show', f'BIN={binaries}']
    done = subprocess.run(
        command, cwd=provenance.ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith('[') and done.stdout.endswith(']\n')
    return done.stdout[1:-2]


@pytest.mark.skipif(not shutil.which('make'), reason='make is not installed')
def test_compiled_programs_are_kept_by_user_and_version(tmp_path):
    folder = f'tessera/jax/{CURRENT}'
    assert kept(HOME=str(tmp_path)) == str(tmp_path / '.cache' / folder)
    assert (tmp_path / '.cache' / folder).is_dir()
    assert kept(HOME='/', XDG_CACHE_HOME=str(tmp_path / 'x')) == str(tmp_path / 'x' / folder)
    assert kept(JAX_COMPILATION_CACHE_DIR=str(tmp_path / 'own')) == str(tmp_path / 'own')
    (tmp_path / 'file').write_text('')  # no folder can be made below it, whoever asks
    assert kept(HOME=str(tmp_path / 'file')) == ''
