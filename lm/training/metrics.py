"""A run's metrics as JSON lines and TensorBoard events, and a progress line."""

import json
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


def read_jsonl(path: epath.PathLike) -> list[dict[str, Any]]:
    """Returns the records of a JSONL file, up to a line that a kill cut short."""
    file = epath.Path(path)
    records = []
    for line in file.read_bytes().splitlines() if file.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict) or type(record.get('step')) is not int:
            break
        records.append(record)
    return records


class Writer:
    """Appends records to `folder/metrics.jsonl` and to TensorBoard files beside it.

    On start at `step`, drops records of later steps by an earlier, killed run, so that the file is
    that of an undisturbed run. Only process 0 writes.
    """

    def __init__(self, folder: epath.PathLike, step: int):
        from tensorboardX import SummaryWriter  # slow to import

        self._file = self._board = None
        if jax.process_index() > 0:
            return
        path = epath.Path(folder) / 'metrics.jsonl'
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read_jsonl(path) if r['step'] <= step]
        temporary = path.with_name(path.name + '.tmp')
        temporary.write_text(''.join(json.dumps(record) + '\n' for record in kept))
        temporary.replace(path)
        self._file = path.open('ab')
        self._board = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """Records one step.

        Args:
          step: its number.
          values: reproducible metrics; they go to both files. Each line of `metrics.jsonl` is one
            write: a kill truncates at most the last line, and `read_jsonl` drops it.
          timings: metrics that depend on the machine's speed; they go to TensorBoard only.
        """
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps({'step': step, **values}).encode() + b'\n')
        self._file.flush()
        for name, value in {**values, **timings}.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        for file in (self._file, self._board):
            if file is not None:
                file.close()


class ProgressLine:
    """A progress bar on a terminal; otherwise a plain line every few seconds."""

    def __init__(self, label: str, total: int, done: int = 0, seconds_between_lines: float = 15.0):
        self._label, self._total = label, total
        self._every, self._printed = seconds_between_lines, time.monotonic()
        self._console = Console()
        self._bar = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn('{task.description}'),
                BarColumn(),
                TextColumn('{task.percentage:3.0f}%'),
                TimeRemainingColumn(),
                TextColumn('{task.fields[note]}'),
                console=self._console,
            )
            self._task = self._bar.add_task(label, total=total, completed=done, note='')

    def __enter__(self):
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception):
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, note: str = '') -> None:
        """Shows progress up to `done` of the total, with a short note."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif done >= self._total or time.monotonic() - self._printed > self._every:
            self._printed = time.monotonic()
            self._console.print(f'{self._label}: {done}/{self._total} {note}', highlight=False)
