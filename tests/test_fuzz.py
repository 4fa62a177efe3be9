"""Damaged and hostile files: each reader gives a result or its error, and does nothing else.

Every reader of `tests.loaders` gets a fixed number of changed folders. Whatever is in them, nothing
is executed, nothing outside of the folder is written, and memory stays within bounds that do not
depend on what a header says.
"""

import os
import pathlib
import pickle
import random
import resource
import shutil
import subprocess
import sys
import tracemalloc
from typing import Any

import pytest

from tests.loaders import Loader, loaders

MOST_PYTHON = (
    128e6  # bytes at once, NumPy's arrays among them: 4,096 lanes of a container take 105 MB
)
MOST_PROCESS = 256e6  # by which the process may grow, libraries in other languages included
RUNS = {
    'pickle.find_class', 'subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn', 'os.fork',
    'os.spawn', 'socket.connect', 'ctypes.dlopen', 'shutil.unpack_archive',
}  # fmt: skip
WRITES = {'os.remove', 'os.rename', 'os.rmdir', 'os.mkdir', 'os.symlink', 'os.link', 'os.truncate'}
LOADERS = loaders()


class Watch:
    """Notes what is run, and what is written outside of a folder; hooks cannot be taken away."""

    def __init__(self):
        self.folder: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in RUNS:
            self.seen.append(f'{event} {arguments}')
        elif event in WRITES or (event == 'open' and _writes(arguments)):
            path = arguments[0]
            inside = isinstance(path, int) or os.path.realpath(path).startswith(self.folder)
            if not inside and os.fspath(path) != os.devnull:
                self.seen.append(f'{event} {arguments}')


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return bool(set(mode) & set('wax+'))
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


@pytest.fixture(scope='module')
def watch():
    watch = Watch()
    yield watch
    watch.folder = None


def outside(root: pathlib.Path, folder: pathlib.Path) -> dict[str, bytes]:
    """Everything below `root` that is not in the folder."""
    found = (file for file in root.rglob('*') if folder not in (file, *file.parents))
    return {str(file): file.read_bytes() if file.is_file() else b'' for file in found}


def changed(loader: Loader, folder: pathlib.Path, draw: random.Random) -> None:
    """Changes one file of the folder, or takes it away."""
    files = [
        file
        for name in loader.files
        for file in [folder / name, *(folder / name).rglob('*')]
        if file.is_file()
    ]
    # Orbax gives random names
    files.sort(key=lambda file: (file.parent, file.stat().st_size, file.name))
    name = draw.choice(files).relative_to(folder).as_posix()
    mutate = next(m for start, m in loader.files.items() if name.startswith(start))
    if draw.random() < 0.02:
        (folder / name).unlink()
        return
    (folder / name).write_bytes(mutate((folder / name).read_bytes(), draw))
    loader.sign(folder)


# of Orbax, which drops what it has begun when a restore fails
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('name', LOADERS)
def test_any_file_is_read_or_refused_and_nothing_else(name, tmp_path, watch):
    loader, draw = LOADERS[name], random.Random(name)
    whole, folder = tmp_path / 'whole', tmp_path / 'in' / 'folder'
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'secret').write_text('as it was')
    loader.make(whole)
    shutil.copytree(whole, folder)
    loader.load(folder)  # as it was written; imports and compiles what it needs
    before, size = outside(tmp_path, folder), _process_bytes()
    results = 0
    for i in range(loader.inputs):
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        changed(loader, folder, draw)
        if not loader.threads:
            tracemalloc.start()
        watch.folder, watch.seen = str(folder.resolve()), []
        try:
            loader.load(folder)
            results += 1
        except (ValueError, FileNotFoundError) as error:
            assert str(error), f'input {i}: an error that says nothing'
        finally:
            watch.folder = None
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert not watch.seen, f'input {i}'
        assert peak < MOST_PYTHON, f'input {i}: {peak:,} bytes'
    assert outside(tmp_path, folder) == before
    assert _process_bytes() - size < MOST_PROCESS
    if loader.refuses:
        assert results < loader.inputs, 'nothing was refused: the changes do not reach the reader'


def _process_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize(
    ('act', 'event'),
    [
        (lambda folder: (folder.parent / 'x').write_text('x'), 'open'),
        (lambda folder: (folder / '..' / 'secret').rename(folder / 'x'), 'os.rename'),
        (lambda folder: (folder / 'link').write_text('x'), 'open'),
        (lambda folder: subprocess.run(['true'], check=True), 'subprocess.Popen'),
        (lambda folder: pickle.loads(pickle.dumps(random.Random)), 'pickle.find_class'),
    ],
)
def test_the_watch_sees(act, event, tmp_path, watch):
    folder = tmp_path / 'folder'
    folder.mkdir()
    (tmp_path / 'secret').write_text('as it was')
    (folder / 'link').symlink_to(tmp_path / 'secret')
    watch.folder, watch.seen = str(folder.resolve()), []
    (folder / 'inside').write_text('x')
    assert not watch.seen
    act(folder)
    watch.folder = None
    assert watch.seen and watch.seen[0].startswith(event)
