"""Kills a small training run again and again, and compares what it comes to with a whole run.

    python -m tests.kill_harness --kills 40        # make soak; prints the table of
                                                   # docs/reliability.md

A run is the command `pretrain` at its tiny scale: text files, encoding, training with checkpoints,
evaluation, a bundle. SIGKILL comes at random moments of every phase in turn, SIGTERM twice per
run; after each the same command is started again, until it ends by itself.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from lm.checkpoints import restore
from lm.files import provenance

STEPS, EVERY = 120, 12
# Phases of one run's signals. Those of evaluation come when training is done.
KILLS = ('loading', 'step', 'save', 'commit', 'step', 'save', 'commit', 'evaluation')
TERMS = ('step', 'evaluation')
# What is compared whole; of the rest, bytes are counted.
COUNTED = ('batches', 'results', 'bundles')
# What ends a phase: batches are packed in all of them. The end of the process has no name.
_LONG = ('step', 'save', 'commit', 'evaluation', None)
# A phase's entries among which one is drawn, and the longest delay after it, in seconds; None: as
# long as the phase lasts. Loading goes on to what is compiled and restored before the first step.
ENTRIES = {'loading': 2, 'step': EVERY, 'save': 1, 'commit': 1, 'evaluation': 3}
LONGEST = {'loading': 1.0, 'step': None, 'save': None, 'commit': None, 'evaluation': 0.1}
NEVER = {'signal': 0, 'phase': '', 'entry': 0, 'delay': 0.0}


@dataclasses.dataclass
class Tally:
    """What one run came to, or several.

    Attributes:
      kills: SIGKILLs sent, by phase.
      steps_lost: after each of them: steps that were done and had to be done again.
      too_many_lost: kills that lost more than the steps since the last save that was complete.
      terms: SIGTERMs sent.
      term_steps_lost: steps lost after those.
      term_seconds: from SIGTERM to the end of the process.
      term_codes: exit codes after SIGTERM that were not 0.
      differing: bytes that differ from the whole run, by what they are of.
      torn: files found torn, after a signal or at the end.
    """

    kills: dict[str, int] = dataclasses.field(default_factory=dict)
    steps_lost: list[int] = dataclasses.field(default_factory=list)
    too_many_lost: int = 0
    terms: int = 0
    term_steps_lost: list[int] = dataclasses.field(default_factory=list)
    term_seconds: list[float] = dataclasses.field(default_factory=list)
    term_codes: list[int] = dataclasses.field(default_factory=list)
    differing: dict[str, int] = dataclasses.field(default_factory=dict)
    torn: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: 'Tally') -> None:
        """Adds what another run came to."""
        for field in dataclasses.fields(self):
            mine, more = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, dict):
                for key, value in more.items():
                    mine[key] = mine.get(key, 0) + value
            else:
                setattr(self, field.name, mine + more)


class Run:
    """One run in a folder of its own, beside the texts that all share."""

    def __init__(self, root: pathlib.Path, name: str):
        self.out, self.log = root / name, root / f'{name}.log'
        self._texts, self._cache = root / 'texts', root / 'cache'
        if not self._texts.exists():
            self._texts.mkdir(parents=True)
            for i in range(40):
                text = f'the {i} cats sat on {i * i} mats. ' * 30
                (self._texts / f'{i}.txt').write_text(text)

    def start(self, moment: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        """Runs the command until it ends, or is ended at its moment."""
        command = [
            sys.executable, '-m', 'tests.kill_child', str(self.log), json.dumps(moment),
            'pretrain', '--scale', 'tiny', '--out', str(self.out),
            '--data', str(self._texts / '*.txt'), '--train.log-every', '1',
            '--train.steps', str(STEPS), '--train.checkpoint-every', str(EVERY),
        ]  # fmt: skip
        environment = {
            **os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': str(self._cache),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'XLA_FLAGS': '',
        }  # fmt: skip
        return subprocess.run(
            command, cwd=provenance.ROOT, env=environment, capture_output=True, text=True
        )

    def finish(self) -> None:
        """Runs the command to its end."""
        done = self.start(NEVER)
        assert done.returncode == 0, done.stderr

    def records(self) -> list[dict[str, Any]]:
        """Returns the lines of the log."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(line) for line in lines]

    def seconds(self, phase: str) -> float:
        """Returns how long a phase lasts: the median time from an entry to the next other event."""
        times = [r for r in self.records() if 'time' in r and r.get('phase') in (phase, *_LONG)]
        spans = [
            after['time'] - begin['time']
            for begin, after in itertools.pairwise(times)
            if begin.get('phase') == phase
        ]
        return sorted(spans)[len(spans) // 2]

    def saved(self) -> int:
        """Returns the newest step that is saved, 0 if there is none."""
        return max(restore.steps(epath.Path(self.out / 'checkpoints')), default=0)

    def torn(self) -> list[str]:
        """Returns the files that are there and cannot be read."""
        found = []
        for file in sorted(self.out.glob('**/*.json*')):
            # what is still being written has another name until it is whole
            if file.name.startswith('.') or 'tmp' in file.relative_to(self.out).as_posix():
                continue
            text = file.read_text()
            try:
                lines = text.splitlines() if file.suffix == '.jsonl' else [text]
                whole = all(json.loads(line) is not None for line in lines)
                whole &= file.suffix != '.jsonl' or text.endswith('\n') or not text
            except ValueError:
                whole = False
            if not whole:
                found.append(str(file.relative_to(self.out)))
        return found

    def state(self) -> dict[str, np.ndarray]:
        """Returns the arrays of the newest checkpoint."""
        folder = epath.Path(self.out / 'checkpoints' / str(self.saved()) / 'state')
        handler = ocp.PyTreeCheckpointHandler()
        on_host = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(folder).tree
        )
        args = ocp.args.PyTreeRestore(restore_args=on_host)
        leaves = jax.tree_util.tree_leaves_with_path(handler.restore(folder, args=args))
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def disturbed(root: pathlib.Path, whole: Run, name: str, seed: int) -> Tally:
    """Runs the command through all signals of one run, and compares it with the whole run."""
    random_ = random.Random(seed)
    run, tally = Run(root, name), Tally()
    moments = [(phase, signal.SIGKILL) for phase in KILLS]
    moments += [(phase, signal.SIGTERM) for phase in TERMS]
    random_.shuffle(moments)
    moments.sort(key=lambda moment: moment[0] == 'evaluation')  # the others need training
    for phase, number in moments:
        # a little past the phase's end, too
        longest = LONGEST[phase] or 1.5 * whole.seconds(phase)
        moment = {
            'signal': int(number), 'phase': phase, 'entry': random_.randint(1, ENTRIES[phase]),
            'delay': random_.random() * longest,
        }  # fmt: skip
        before = len(run.records())
        done = run.start(moment)
        _count(tally, run, run.records()[before:], moment, done)
    run.finish()
    tally.torn += run.torn()
    tally.differing = differing(run, whole)
    return tally


def _count(tally, run: Run, records, moment, done) -> None:
    """Adds to the tally what one signal did."""
    sent = [r['time'] for r in records if 'signal' in r]
    if not sent:
        raise AssertionError(f'{moment} never came: {done.stderr}')
    saved = run.saved()
    reached = max([r['step'] for r in records if 'step' in r], default=saved)
    lost = max(reached - saved, 0)
    tally.torn += run.torn()
    if moment['signal'] == signal.SIGKILL:
        assert done.returncode == -signal.SIGKILL, (moment, done.stderr)
        tally.kills[moment['phase']] = tally.kills.get(moment['phase'], 0) + 1
        tally.steps_lost.append(lost)
        # a save under way is not complete: it may be that one and the steps that it waits for
        tally.too_many_lost += lost > 2 * EVERY
    else:
        tally.terms += 1
        tally.term_steps_lost.append(lost)
        tally.term_seconds.append(time.time() - sent[0])
        said = 'run the same command again to resume' in done.stderr
        finished = any('exit' in r for r in records)  # before the signal came
        if not finished and (done.returncode or not said):
            tally.term_codes.append(done.returncode)


def differing(run: Run, whole: Run) -> dict[str, int]:
    """Returns how many bytes of a run differ from the whole run's, by what they are of."""
    mine, other = run.state(), whole.state()
    assert mine.keys() == other.keys()
    counts = {'parameters': 0, 'optimizer state': 0}
    for name, array in mine.items():
        kind = 'parameters' if 'params' in name else 'optimizer state'
        counts[kind] += _bytes(array.tobytes(), other[name].tobytes())
    place = pathlib.Path('checkpoints') / str(STEPS) / 'data' / 'process_0-of-1.json'
    for name, file in (('place in the data', place), ('metrics file', 'metrics.jsonl')):
        counts[name] = _bytes((run.out / file).read_bytes(), (whole.out / file).read_bytes())
    order = {r['step']: r['batch'] for r in whole.records() if 'step' in r}
    wrong = sum(r['batch'] != order[r['step']] for r in run.records() if 'step' in r)
    counts['batches'] = wrong
    results = [json.loads((x.out / 'result.json').read_text()) for x in (run, whole)]
    counts['results'] = sum(
        results[0][key] != results[1][key] for key in results[1] if 'seconds' not in key
    )
    digests = [
        json.loads((x.out / 'bundle/config.json').read_text())['digest'] for x in (run, whole)
    ]
    counts['bundles'] = int(digests[0] != digests[1])
    return counts


def _bytes(one: bytes, other: bytes) -> int:
    return sum(a != b for a, b in zip(one, other)) + abs(len(one) - len(other))


def table(tally: Tally) -> str:
    """Returns a tally as the table of docs/reliability.md."""
    phases = ', '.join(f'{count} in {phase}' for phase, count in sorted(tally.kills.items()))
    rows = [
        ('SIGKILLs', f'{sum(tally.kills.values())} ({phases})'),
        ('steps lost per kill', f'{np.mean(tally.steps_lost):.1f} on average, '
         f'{max(tally.steps_lost)} at most, of {STEPS}; a checkpoint every {EVERY}'),
        *((f'{name} that differ' if name in COUNTED else f'bytes differing: {name}', str(count))
          for name, count in tally.differing.items()),
        ('files torn', str(len(tally.torn))),
        ('SIGTERMs', f'{tally.terms}; exit codes other than 0: {len(tally.term_codes)}'),
        ('steps lost per SIGTERM', f'{max(tally.term_steps_lost)} at most'),
        ('seconds from SIGTERM to the end', f'{max(tally.term_seconds):.1f} at most'),
    ]  # fmt: skip
    return '\n'.join(['| what | result |', '|---|---|', *(f'| {a} | {b} |' for a, b in rows)])


def main() -> None:
    """Runs the number of kills asked for, in runs of eight; prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--kills', type=int, default=40, help='a multiple of 8')
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    arguments = parser.parse_args()
    total = Tally()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        whole = Run(root, 'whole')
        whole.finish()
        for i in range(arguments.kills // len(KILLS)):
            tally = disturbed(root, whole, f'run{i}', arguments.seed + i)
            total.add(tally)
            print(f'run {i}: {tally}', file=sys.stderr, flush=True)
    print(table(total))
    assert not any(total.differing.values()) and not total.torn and not total.term_codes


if __name__ == '__main__':
    main()
