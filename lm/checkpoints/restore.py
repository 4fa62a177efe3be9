"""Reading a saved step, or a part of it, and telling whether it is what was saved."""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from lm.files import atomic, checksums

T = TypeVar('T')


class Damaged(Exception):
    """A step cannot be read, or is not what was saved."""


class Unfit(Exception):
    """A step is of another model, other data or another number of processes."""


class Place:
    """An iterator's place in the data as bytes with their SHA-256, as grain saves and restores it.

    Attributes:
      checked: whether the place that was read has a SHA-256; older versions wrote none.
    """

    def __init__(self, batches: grain.DatasetIterator):
        self._batches = batches
        self._read: Any = None
        self.checked = False

    def get_state(self) -> bytes:
        """Returns what is saved."""
        state = self._batches.get_state()
        return json.dumps({'sha256': _digest(state), 'state': state}, indent=1).encode()

    def set_state(self, saved: bytes) -> None:
        """Reads what was saved, for `apply`; raises ValueError if a byte of it has changed."""
        read = json.loads(saved)
        self.checked = read.keys() == {'sha256', 'state'}
        if self.checked and _digest(read['state']) != read['sha256']:
            raise ValueError('its SHA-256 differs')
        self._read = read['state'] if self.checked else read

    def start_prefetch(self) -> None:
        """Does nothing: the iterator is not at its place yet."""

    def apply(self) -> None:
        """Moves the iterator to the place that was read."""
        self._batches.set_state(self._read)
        self._batches.start_prefetch()


def _digest(state: Any) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def steps(folder: epath.Path) -> list[int]:
    """Returns the steps in a folder of checkpoints, whole or not, the newest first."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def read(step: epath.Path, like: Any, batches: grain.DatasetIterator) -> tuple[Any, Place]:
    """Returns the state in the folder of a step, and the place in the data.

    All processes come to the same end: what one of them cannot read, none has read.

    Raises:
      Damaged: a file is missing, unreadable, or not what was saved.
      Unfit: the step has other leaves, dtypes or shapes than `like`, or is of other processes.
    """

    def local() -> tuple[Any, Place, Mapping[str, checksums.Record] | None]:
        recorded, want = _recorded(step), checksums.kinds(like)
        have = _checked_kinds(step, want, recorded)
        if more := sorted(have.keys() - want.keys()):
            raise Unfit(f'{more[0]} is not part of this model')
        place = _place(step, batches, recorded is not None)
        return _leaves(step, like), place, recorded

    state, place, recorded = _everywhere(local)
    _check_sums(state, recorded)
    return state, place


def load_params(folder: epath.PathLike, like: Any, step: int | None = None) -> Any:
    """Returns parameters from a run's checkpoints, reading the leaves of `like` and no others.

    `load_params(out / 'checkpoints', {'body': params.abstract(config, mesh)['body']})` is the body
    without its tables, of any size, on any mesh.

    Args:
      folder: the run's `checkpoints/`.
      like: a part of the nested dict of parameters: `jax.ShapeDtypeStruct`s with shardings.
      step: which; the newest if not given.

    Raises:
      FileNotFoundError: no such step.
      OSError: a file of the step is damaged.
      ValueError: the parameters do not have the leaves, dtypes and shapes of `like`.
    """
    folder = atomic.absolute(folder)
    there = steps(folder)
    if not there or step not in (None, *there):
        raise FileNotFoundError(f'{folder}: no step {"" if step is None else step} here: {there}')
    saved = folder / str(there[0] if step is None else step)
    wanted = {'params': like}
    try:
        recorded = _recorded(saved)
        _checked_kinds(saved, checksums.kinds(wanted), recorded)
        part = _leaves(saved, wanted)
        _check_sums(part, recorded)
    except Damaged as problem:
        raise OSError(f'{saved}: damaged: {problem}') from None
    except Unfit as problem:
        raise ValueError(f'{saved}: does not fit this model: {problem}') from None
    return part['params']


def leaves(folder: epath.Path, like: Any) -> Any:
    """Returns the leaves of `like` from a tree that Orbax saved, and reads no others."""
    restore_args = jax.tree.map(
        lambda x: ocp.ArrayRestoreArgs(
            sharding=x.sharding, global_shape=x.shape, dtype=x.dtype, strict=True
        ),
        like,
    )
    args = ocp.args.PyTreeRestore(item=like, restore_args=restore_args, partial_restore=True)
    with _reads_ended():
        return ocp.PyTreeCheckpointHandler().restore(folder, args=args)


def metadata(folder: epath.Path) -> Any:
    """Returns what a tree that Orbax saved has for leaves: their dtypes, shapes and storage."""
    with _reads_ended():
        saved = ocp.PyTreeCheckpointHandler().metadata(folder)
    return getattr(saved, 'tree', saved)


class _EndingLoop(asyncio.SelectorEventLoop):
    def close(self) -> None:
        """Closes the loop when nothing runs in it any more."""
        if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()


class _EndingLoops(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _EndingLoop()


@contextlib.contextmanager
def _reads_ended() -> Iterator[None]:
    """Lets Orbax end the reads that are under way when another one fails.

    It closes their event loop instead, and each prints a traceback in front of the run's one line.
    """
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_EndingLoops())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)


def _recorded(step: epath.Path) -> dict[str, checksums.Record] | None:
    """Returns the checksums of a step, or None where an older version saved it."""
    folder = step / 'checksums'
    if not folder.exists():
        return None
    try:
        recorded = ocp.JsonCheckpointHandler().restore(folder, ocp.args.JsonRestore())
        if all(record.keys() == {'kind', 'sum'} for record in recorded.values()):
            return recorded
    except Exception as error:
        raise Damaged(f'checksums/ cannot be read ({_line(error)})') from error
    raise Damaged('checksums/ is not what was saved')


def _checked_kinds(
    step: epath.Path,
    want: Mapping[str, str],
    recorded: Mapping[str, checksums.Record] | None,
) -> dict[str, str]:
    """Returns dtype and shape of each leaf in a step; raises unless those of `want` are there."""
    try:
        found = checksums.kinds(metadata(step / 'state'))
    except Exception as error:
        raise Damaged(f'state/ cannot be read ({_line(error)})') from error
    # what was saved, whatever became of it since
    have = {leaf: str(record['kind']) for leaf, record in (recorded or {}).items()} or found
    for leaf, kind in want.items():
        if leaf not in have:
            raise Unfit(f'{leaf} is missing')
        if have[leaf] != kind:
            raise Unfit(f'{leaf} is {have[leaf]}, expected {kind}')
    for leaf, kind in have.items():
        if found.get(leaf) != kind:
            raise Damaged(f'state/ has {leaf} as {found.get(leaf)}, and was saved as {kind}')
    return have


def _place(step: epath.Path, batches: grain.DatasetIterator, checked: bool) -> Place:
    folder, place = step / 'data', Place(batches)
    mine = f'-of-{jax.process_count()}.json'
    others = [file.name for file in folder.glob('process_*.json')] if folder.exists() else []
    if others and not any(name.endswith(mine) for name in others):
        count = others[0].partition('-of-')[2].removesuffix('.json')
        raise Unfit(f'saved by {count} processes, here are {jax.process_count()}')
    try:
        args = grain.checkpoint.CheckpointRestore(place)
        grain.checkpoint.CheckpointHandler().restore(folder, args=args)
    except Exception as error:
        raise Damaged(f'data/ cannot be read ({_line(error)})') from error
    if place.checked != checked:
        raise Damaged(f'{"data" if checked else "checksums"}/ is not what was saved')
    return place


def _leaves(step: epath.Path, like: Any) -> Any:
    try:
        return leaves(step / 'state', like)
    except jax.errors.JaxRuntimeError:
        raise  # the devices' own trouble, no room for the state, say
    except Exception as error:
        raise Damaged(f'state/ cannot be read ({_line(error)})') from error


def _check_sums(tree: Any, recorded: Mapping[str, checksums.Record] | None) -> None:
    if recorded and (wrong := checksums.differing(tree, recorded)):
        more = f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''
        raise Damaged(f'state/ has other bytes in {wrong[0]}{more} than were saved')


def _everywhere(do: Callable[[], T]) -> T:
    """Returns what `do` returns; where it fails on one process, fails on all."""
    problem: Damaged | Unfit | None = None
    result: list[T] = []
    try:
        result.append(do())
    except (Damaged, Unfit) as error:
        problem = error
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.asarray(problem is not None))
        if failed.any() and problem is None:
            problem = Damaged(f'process {int(failed.argmax())} cannot use it')
    if problem is not None:
        raise problem
    return result[0]


def _line(error: BaseException) -> str:
    """Returns the start of an error's first line: libraries write pages.

    It is the first error's of those that were raised from each other, which names leaf or file.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().partition('\n')[0] or type(error).__name__
    return text if len(text) <= 160 else f'{text[:160]}...'
