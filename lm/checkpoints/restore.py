"""Reads a saved step, or a part of it, and verifies its checksums."""

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
    """A step is unreadable, or has changed since it was saved."""


class Unfit(Exception):
    """A step belongs to another model, other data or another number of processes."""


class DataPosition:
    """The position of a data iterator, which grain saves and restores as bytes with a SHA-256.

    Attributes:
      checked: whether the saved position has a SHA-256; older versions wrote none.
    """

    def __init__(self, batches: grain.DatasetIterator):
        self._batches = batches
        self._read: Any = None
        self.checked = False

    def get_state(self) -> bytes:
        """Returns the bytes to save."""
        state = self._batches.get_state()
        return json.dumps({'sha256': _digest(state), 'state': state}, indent=1).encode()

    def set_state(self, saved: bytes) -> None:
        """Parses saved bytes for `apply`; raises ValueError if a byte has changed."""
        read = json.loads(saved)
        self.checked = read.keys() == {'sha256', 'state'}
        if self.checked and _digest(read['state']) != read['sha256']:
            raise ValueError('its SHA-256 differs')
        self._read = read['state'] if self.checked else read

    def start_prefetch(self) -> None:
        """Does nothing: the iterator has not been moved yet."""

    def apply(self) -> None:
        """Moves the iterator to the saved position."""
        self._batches.set_state(self._read)
        self._batches.start_prefetch()


def steps(folder: epath.Path) -> list[int]:
    """Returns the steps in a folder of checkpoints, newest first, damaged or not."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def read(step: epath.Path, like: Any, batches: grain.DatasetIterator) -> tuple[Any, DataPosition]:
    """Returns the state saved in the folder of a step, and the position in the data.

    All processes have the same outcome: if one fails, all fail.

    Raises:
      Damaged: a file is missing, unreadable, or has changed since it was saved.
      Unfit: its leaves, dtypes or shapes differ from those of `like`, or another number of
        processes saved it.
    """

    def local() -> tuple[Any, DataPosition, Mapping[str, checksums.Record] | None]:
        recorded, want = _recorded(step), checksums.kinds(like)
        have = _checked_kinds(step, want, recorded)
        if more := sorted(have.keys() - want.keys()):
            raise Unfit(f'{more[0]} is not part of this model')
        position = _position(step, batches, recorded is not None)
        return _leaves(step, like), position, recorded

    state, position, recorded = _everywhere(local)
    _check_sums(state, recorded)
    return state, position


def load_params(folder: epath.PathLike, like: Any, step: int | None = None) -> Any:
    """Loads parameters from a run's checkpoints; reads only the leaves of `like`.

    `load_params(out / 'checkpoints', {'body': params.abstract(config, mesh)['body']})` loads the
    body without the tables, whatever their size, on any mesh.

    Args:
      folder: the run's `checkpoints/`.
      like: a part of the nested dict of parameters: `jax.ShapeDtypeStruct`s with shardings.
      step: the step to load; by default the newest.

    Raises:
      FileNotFoundError: there is no such step.
      OSError: a file of the step is damaged.
      ValueError: the parameters do not have the leaves, dtypes and shapes of `like`.
    """
    folder = atomic.absolute(folder)
    there = steps(folder)
    if not there or step not in (None, *there):
        raise FileNotFoundError(
            f'{folder}: no step{"" if step is None else f" {step}"}; found {there}'
        )
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
    """Loads the leaves of `like` from a tree saved by Orbax; reads no others."""
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
    """Returns dtype, shape and storage of each leaf of a tree saved by Orbax."""
    with _reads_ended():
        saved = ocp.PyTreeCheckpointHandler().metadata(folder)
    return getattr(saved, 'tree', saved)


def _digest(state: Any) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


class _EndingLoop(asyncio.SelectorEventLoop):
    def close(self) -> None:
        """Closes the loop once all of its tasks have ended."""
        if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()


class _EndingLoops(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _EndingLoop()


@contextlib.contextmanager
def _reads_ended() -> Iterator[None]:
    """Makes Orbax wait for reads in progress when another read fails.

    By default it closes their event loop, and each prints a traceback before the run's error.
    """
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_EndingLoops())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)


def _recorded(step: epath.Path) -> dict[str, checksums.Record] | None:
    """Returns the checksums of a step; None if an older version saved it."""
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
    """Returns dtype and shape of each leaf of a step; raises unless they include `want`."""
    try:
        found = checksums.kinds(metadata(step / 'state'))
    except Exception as error:
        raise Damaged(f'state/ cannot be read ({_line(error)})') from error
    # as recorded on saving, even if the files have changed since
    have = {leaf: str(record['kind']) for leaf, record in (recorded or {}).items()} or found
    for leaf, kind in want.items():
        if leaf not in have:
            raise Unfit(f'{leaf} is missing')
        if have[leaf] != kind:
            raise Unfit(f'{leaf} is {have[leaf]}, expected {kind}')
    for leaf, kind in have.items():
        if found.get(leaf) != kind:
            raise Damaged(f'state/ has {leaf} as {found.get(leaf)}, but it was saved as {kind}')
    return have


def _position(step: epath.Path, batches: grain.DatasetIterator, checked: bool) -> DataPosition:
    folder, position = step / 'data', DataPosition(batches)
    mine = f'-of-{jax.process_count()}.json'
    others = [file.name for file in folder.glob('process_*.json')] if folder.exists() else []
    if others and not any(name.endswith(mine) for name in others):
        count = others[0].partition('-of-')[2].removesuffix('.json')
        raise Unfit(f'saved by {count} processes, but this run has {jax.process_count()}')
    try:
        args = grain.checkpoint.CheckpointRestore(position)
        grain.checkpoint.CheckpointHandler().restore(folder, args=args)
    except Exception as error:
        raise Damaged(f'data/ cannot be read ({_line(error)})') from error
    if position.checked != checked:
        raise Damaged(f'{"data" if checked else "checksums"}/ is not what was saved')
    return position


def _leaves(step: epath.Path, like: Any) -> Any:
    try:
        return leaves(step / 'state', like)
    except jax.errors.JaxRuntimeError:
        raise  # an error of the devices, such as out of memory
    except Exception as error:
        raise Damaged(f'state/ cannot be read ({_line(error)})') from error


def _check_sums(tree: Any, recorded: Mapping[str, checksums.Record] | None) -> None:
    if recorded and (wrong := checksums.differing(tree, recorded)):
        more = f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''
        raise Damaged(f'state/ differs in {wrong[0]}{more} from what was saved')


def _everywhere(do: Callable[[], T]) -> T:
    """Returns the result of `do`; a failure on one process fails on all."""
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
    """Returns the start of the first line of an error's root cause, which names the leaf or file.


    Libraries' errors may fill pages.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().partition('\n')[0] or type(error).__name__
    return text if len(text) <= 160 else f'{text[:160]}...'
