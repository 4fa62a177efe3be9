"""Tokenizes a text and another of ten times its size, each in a new process."""

import concurrent.futures
import contextlib
import itertools
import multiprocessing
from collections.abc import Iterator, Sequence

from etils import epath

from experiments import corpora, report, resume
from experiments.bench_tokenize.config import Config
from experiments.report import Column
from experiments.tokenize import main as tokenize
from experiments.tokenize.config import Config as TokenizeConfig
from tokenization.vocabularies.bpe import BPETokenizer

_TIMES = 10
_COLUMNS = (
    Column('text', 'text MB', '.0f'),
    Column('workers', 'workers', 'd'),
    Column('shards', 'shards', 'd'),
    Column('peak', 'peak MB of a process', '.0f'),
    Column('speed', 'MB/s', '.1f'),
)


def main(config: Config, out: epath.Path) -> dict[str, float]:
    """Prints and returns peak memory and throughput for each size and number of workers."""
    source = corpora.standard_library().train
    tokenizer = config.tokenizer
    if tokenizer == 'bpe':
        tokenizer = str(out / 'tokenizer')
        sample = corpora.first_bytes(source, 4_000_000)
        resume.tokenizer_once(
            out / 'tokenizer', lambda: BPETokenizer.train(sample, config.vocab_size)
        )
    rows, metrics = [], {}
    for times in (1, _TIMES):
        size = int(config.megabytes * times * 1e6)
        with _text(out / 'text', source, size, config.files) as pattern:
            for workers in config.workers:
                asked = TokenizeConfig(
                    tokenizer, pattern, shard_bytes=config.shard_bytes, workers=workers,
                    hosts=1, host=0,  # given, because asking JAX could claim the accelerator
                )  # fmt: skip
                found, shards = _measure(asked, out / 'shards')
                rows.append({'text': size / 1e6, 'workers': workers, 'shards': shards, **found})
                for name, value in found.items():
                    metrics[report.key(name, f'times_{times}', workers=workers)] = value
    report.table(rows, _COLUMNS, f'tokenize, {config.tokenizer}')
    (out / 'table.md').write_text(report.markdown_table(rows, _COLUMNS))
    return metrics


def _measure(asked: TokenizeConfig, out: epath.Path) -> tuple[dict[str, float], int]:
    """Returns peak memory and throughput of one run in a new process, and its number of shards."""
    out.rmtree(missing_ok=True)
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        found = pool.submit(tokenize.main, asked, out).result()
    shards = len(list(out.glob('*.array_record')))
    out.rmtree()
    return {'peak': found['peak_mb/process'], 'speed': found['mb_per_s/text']}, shards


@contextlib.contextmanager
def _text(folder: epath.Path, source: Sequence[bytes], size: int, files: int) -> Iterator[str]:
    """Writes `size` bytes of the repeated source into files; yields their glob pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for number in range(files):
            left = size // files
            with (folder / f'{number}.txt').open('wb') as file:
                for i in itertools.count(number * len(source) // files):
                    left -= file.write(source[i % len(source)][:left])
                    if not left:
                        break
        yield f'{folder}/*.txt'
    finally:
        folder.rmtree()
