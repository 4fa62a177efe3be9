"""Writes the shards that are missing: in this process, in several, or as a Beam pipeline."""

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
    """Writes what is missing of this host's shards; with the last of all hosts', the index."""
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
    """Returns the tokenizer of `--tokenizer`: bytes, or a folder that holds one."""
    if name == 'bytes':
        return ByteTokenizer()
    folder = epath.Path(name)
    return loading.load(folder / 'tokenizer' if (folder / 'params').exists() else folder)


def peak_megabytes() -> float:
    """Returns the most memory that this process has held so far."""
    status = pathlib.Path('/proc/self/status')
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith('VmHWM:'):  # the figure below counts what it was forked from, too
            return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _measured(task: Task) -> tuple[Shard, float]:
    return plan.write(task), peak_megabytes()


def _write(tasks: Sequence[Task], workers: int) -> Iterator[tuple[Shard, float]]:
    """Yields what each shard holds, as they are finished, and the peak memory of its process."""
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(_measured, tasks)
        return
    # Spawned: JAX has threads, which a fork would not take along.
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(workers, context, _follow_parent) as pool:
        waiting = [pool.submit(_measured, task) for task in tasks]
        try:
            for future in concurrent.futures.as_completed(waiting):
                yield future.result()
        except BrokenProcessPool:
            raise ChildProcessError(
                'a worker was killed, perhaps for want of memory: give fewer --workers; the same '
                'command goes on with the shards that are missing'
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _follow_parent() -> None:
    """Ends a worker with the program that started it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at ^C, without a traceback from each
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
