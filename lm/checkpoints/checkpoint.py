"""Training checkpoints: train state and position in the data, saved together by Orbax.

    checkpoints/40/state/       the train state, by Orbax
    checkpoints/40/data/        the data position, JSON with its SHA-256, one file per process
    checkpoints/40/checksums/   dtype, shape and sum of each leaf of the state: `lm.files.checksums`

Checkpoints by older versions have neither checksums nor SHA-256, and load unverified.
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
from lm.checkpoints.restore import Damaged, DataPosition, Unfit
from lm.files import atomic, checksums


class Checkpoints:
    """The newest few steps of a run in one folder. Steps appear there atomically."""

    def __init__(self, folder: epath.PathLike, keep: int = 2):
        self._folder = atomic.absolute(folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def steps(self) -> list[int]:
        """Returns the saved steps, newest first, damaged or not."""
        return restore.steps(self._folder)

    def save(self, step: int, state: Any, batches: grain.DatasetIterator) -> None:
        """Saves asynchronously; arrays may be donated as soon as this returns.

        Raises:
          OSError: this save or an earlier one failed; names the folder and the reason.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=grain.checkpoint.CheckpointSave(DataPosition(batches)),
            checksums=ocp.args.JsonSave(checksums.of(state)),
        )
        with self._naming_the_folder():
            self._manager.save(step, args=args)

    def restore(self, like: Any, batches: grain.DatasetIterator) -> tuple[int, Any]:
        """Returns the newest intact step and its state, and moves `batches` to its position.

        Newer, damaged steps are reported and moved to `checkpoints.damaged/` beside the folder,
        since the run will save those steps again.

        Args:
          like: one `jax.ShapeDtypeStruct` with a sharding per leaf, on any mesh.
          batches: the iterator of a pipeline equal to the saved one.

        Raises:
          ValueError: no step is usable, and some do not fit `like` or this run.
          OSError: every step is damaged. Nothing is moved or deleted.
        """
        problems: dict[int, Exception] = {}
        for step in self.steps():
            try:
                state, position = restore.read(self._folder / str(step), like, batches)
            except (Damaged, Unfit) as problem:
                problems[step] = problem
                continue
            self._set_aside(problems, step)
            position.apply()
            return step, state
        said = '; '.join(f'step {step}: {problem}' for step, problem in problems.items())
        if any(isinstance(problem, Unfit) for problem in problems.values()):
            raise ValueError(
                f'{self._folder}: does not fit this model and data: give another --out, or '
                f'remove the folder ({said})'
            )
        raise OSError(
            f'{self._folder}: no intact checkpoint: {said}. Nothing was deleted: restore the files '
            'from a copy, or remove the folder to start again'
        )

    def close(self) -> None:
        """Waits for saves in progress."""
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
                    f'{self._folder}: step {step} cannot be used: {problem}; resuming from '
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
