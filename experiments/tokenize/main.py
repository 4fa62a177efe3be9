"""Writes the missing shards: in this process, in workers, or as a Beam pipeline."""

import concurrent.futures
import multiprocessing
import os
import pathlib
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

import jax
from etils import epath
from rich.console import Console

from experiments import corpora
from experiments.tokenize import beam, plan
from experiments.tokenize.config import Config
from experiments.tokenize.plan import Task
from lm.data.shard_index import Index, Shard
from lm.training.metrics import ProgressLine
from tokenization import loading
from tokenization.tokenizer import Tokenizer
from tokenization.vocabularies.byte import ByteTokenizer


def main(config: Config, out: epath.Path) -> dict[str, float]:
    """Writes this host's missing shards, and the index once the shards of all hosts exist."""
    begin = time.monotonic()
    if config.beam is not None:
        beam.check()
    tokenizer = open_tokenizer(config.tokenizer)
    corpus = corpora.open_corpus(config.data, config.tfds)
    planned = plan.make(corpus, tokenizer, config.shard_bytes, out)
    plan.begin(planned, tokenizer, config.shard_bytes)
    host, hosts = config.host, config.hosts
    if host is None or hosts is None:
        host, hosts = jax.process_index(), jax.process_count()
    tasks = [task for task in planned.tasks[host::hosts] if plan.part_of(task) is None]
    plan.check_space(planned, tasks)
    written, peak = 0, 0.0
    if config.beam is not None:
        beam.run(tasks, config.beam)
        written = sum(shard.bytes for shard in map(plan.part_of, tasks) if shard)
    else:
        with ProgressLine('shards', len(tasks)) as progress:
            for done, (shard, held) in enumerate(_write(tasks, config.workers), start=1):
                written, peak = written + shard.bytes, max(peak, held)
                progress.update(done)
    index, missing = plan.finish(planned)
    _say(out, index, tasks, missing)
    seconds = time.monotonic() - begin
    peak = max(peak, peak_megabytes())
    return {'mb_per_s/text': written / seconds / 1e6, 'peak_mb/process': peak}


def open_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer that `--tokenizer` names: `bytes`, or a folder."""
    if name == 'bytes':
        return ByteTokenizer()
    folder = epath.Path(name)
    return loading.load(folder / 'tokenizer' if (folder / 'params').exists() else folder)


def peak_megabytes() -> float:
    """Returns the peak memory of this process so far, in MB."""
    status = pathlib.Path('/proc/self/status')
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith('VmHWM:'):  # the fallback below also counts the process it forked from
            return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _measured(task: Task) -> tuple[Shard, float]:
    return plan.write(task), peak_megabytes()


def _write(tasks: Sequence[Task], workers: int) -> Iterator[tuple[Shard, float]]:
    """Yields each finished shard's description, and the peak memory of its process in MB."""
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(_measured, tasks)
        return
    # Spawned, since JAX's threads do not survive a fork.
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(workers, context, _follow_parent) as pool:
        waiting = [pool.submit(_measured, task) for task in tasks]
        try:
            for future in concurrent.futures.as_completed(waiting):
                yield future.result()
        except BrokenProcessPool:
            raise ChildProcessError(
                'a worker was killed, perhaps because memory ran out: give fewer --workers; the '
                'same command continues with the missing shards'
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _follow_parent() -> None:
    """Ends a worker when its parent process ends, however that happens."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from each worker on ^C
    parent = multiprocessing.parent_process()

    def follow():
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _say(out: epath.Path, index: Index, written: Sequence[Task], missing: Sequence[Task]) -> None:
    found = [shard for split in index.splits.values() for shard in split]
    documents, tokens = sum(s.documents for s in found), sum(s.tokens for s in found)
    line = (
        f'{out}: wrote {len(written)} shards; {documents:,} documents, {tokens:,} ids, '
        f'{sum(s.bytes for s in found):,} bytes of text'
    )
    if missing:
        line += f'; {len(missing)} shards of other hosts are missing, {missing[0].path.name} first'
    Console().print(line, highlight=False, soft_wrap=True)
