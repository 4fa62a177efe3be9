"""Checkpoints of a run: the train state and the place in the data, saved as one step by Orbax.

    checkpoints/40/state/       the train state, by Orbax
    checkpoints/40/data/        the place in the data, JSON with its SHA-256, one file per process
    checkpoints/40/checksums/   dtype, shape and sum of each leaf of the state: `lm.files.checksums`

Steps of older versions have no checksums and no SHA-256, and load unverified.
"""

import contextlib
import sys
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from lm.checkpoints import restore
from lm.checkpoints.restore import Damaged, Place, Unfit
from lm.files import atomic, checksums


class Checkpoints:
    """The newest few steps of a run in one folder. A step appears there whole or not at all."""

    def __init__(self, folder: epath.PathLike, keep: int = 2):
        self._folder = atomic.absolute(folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def steps(self) -> list[int]:
        """Returns the steps that are there, the newest first, whole or not."""
        return restore.steps(self._folder)

    def save(self, step: int, state: Any, batches: grain.DatasetIterator) -> None:
        """Saves in the background; arrays may be donated as soon as this returns.

        Raises:
          OSError: an earlier save, or this one, failed; names the folder and says why.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=grain.checkpoint.CheckpointSave(Place(batches)),
            checksums=ocp.args.JsonSave(checksums.of(state)),
        )
        with self._naming_the_folder():
            self._manager.save(step, args=args)

    def restore(self, like: Any, batches: grain.DatasetIterator) -> tuple[int, Any]:
        """Returns the newest whole step and its state, and sets `batches` to its place.

        Damaged steps after it are said to be so, and moved to `checkpoints.damaged/` beside the
        folder: the run will save those steps again.

        Args:
          like: a `jax.ShapeDtypeStruct` with its sharding per leaf; any mesh will do.
          batches: the iterator of a pipeline equal to the one whose place was saved.

        Raises:
          ValueError: no step has the leaves, dtypes and shapes of `like`.
          OSError: no step is whole. Nothing is moved or deleted.
        """
        problems: dict[int, Exception] = {}
        for step in self.steps():
            try:
                state, place = restore.read(self._folder / str(step), like, batches)
            except (Damaged, Unfit) as problem:
                problems[step] = problem
                continue
            self._set_aside(problems, step)
            place.apply()
            return step, state
        said = '; '.join(f'step {step}: {problem}' for step, problem in problems.items())
        if any(isinstance(problem, Unfit) for problem in problems.values()):
            raise ValueError(
                f'{self._folder}: does not fit this model and data: give another --out, or '
                f'remove the folder ({said})'
            )
        raise OSError(
            f'{self._folder}: no whole checkpoint: {said}. Nothing was deleted: bring the files '
            'back, or remove the folder to start again'
        )

    def close(self) -> None:
        """Waits for saves under way."""
        with self._naming_the_folder():
            self._manager.wait_until_finished()
            self._manager.close()

    def _set_aside(self, problems: dict[int, Exception], whole: int) -> None:
        aside = self._folder.with_name(f'{self._folder.name}.damaged')
        if problems and jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            for step, problem in problems.items():
                times = sum(1 for _ in aside.glob(f'{step}*'))
                target = aside / (f'{step}.{times}' if times else f'{step}')
                (self._folder / str(step)).rename(target)
                print(
                    f'{self._folder}: step {step} cannot be used: {problem}; going on from '
                    f'step {whole} (step {step} is now {target})',
                    file=sys.stderr,
                )
        if problems:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices('damaged steps are set aside')
            self._manager.reload()

    @contextlib.contextmanager
    def _naming_the_folder(self):
        try:
            yield
        except (OSError, ValueError) as error:
            if not atomic.is_failed_write(error):
                raise
            raise OSError(f'{self._folder}: {atomic.cannot_write(error)}') from error
