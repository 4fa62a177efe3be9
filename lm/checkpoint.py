"""Checkpoints of a run: the train state and the place in the data, saved as one step by Orbax."""

import contextlib
from typing import Any

import grain
import orbax.checkpoint as ocp
from etils import epath

from lm import atomic


class Checkpoints:
    """The newest few steps of a run in one folder. A step appears there whole or not at all."""

    def __init__(self, folder: epath.PathLike, keep: int = 2):
        self._folder = epath.Path(folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(atomic.absolute(folder), options=options)

    def latest_step(self) -> int | None:
        """Returns the newest step saved, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, batches: grain.DatasetIterator) -> None:
        """Saves in the background; arrays may be donated as soon as this returns."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(batches)
        )
        with self._naming_the_folder():
            self._manager.save(step, args=args)

    def restore(self, step: int, like: Any, batches: grain.DatasetIterator) -> Any:
        """Returns the state of a step and sets `batches` to its place.

        `like` holds a `jax.ShapeDtypeStruct` with its sharding per leaf.

        Raises:
          ValueError: the saved state does not have the leaves and shapes of `like`.
        """
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(like),
                    data=grain.checkpoint.CheckpointRestore(batches),
                ),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{self._folder}: step {step} does not fit this model and data: give another '
                f'--out, or remove the folder ({error})'
            ) from None
        return restored['state']

    def close(self) -> None:
        """Waits for saves under way."""
        with self._naming_the_folder():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextlib.contextmanager
    def _naming_the_folder(self):
        try:
            yield
        except (OSError, ValueError) as error:
            if not atomic.is_failed_write(error):
                raise
            raise OSError(f'{self._folder}: {atomic.cannot_write(error)}') from error
