"""Compresses one file."""

import time

from etils import epath
from rich.console import Console

from experiments import byte_models
from experiments.compress.config import SUFFIX, Config
from lm.files import atomic
from lm.training.metrics import ProgressLine
from tokenization.coding import container


def main(config: Config, out: epath.Path) -> dict[str, float]:
    """Writes the compressed file atomically; returns its bits per byte and the throughput."""
    source = epath.Path(config.file)
    if source.is_dir():
        raise IsADirectoryError(f'{source}: is a folder; give a file')
    size = source.stat().length
    target = epath.Path(config.to or f'{config.file}{SUFFIX}')
    partial = byte_models.atomically(target)
    model = byte_models.open_byte_model(config.model)
    begin = time.monotonic()
    done = 0
    with source.open('rb') as reader:
        try:
            with partial.open('wb') as writer, ProgressLine('compressing', size) as line:

                def progress(count: int) -> None:
                    nonlocal done
                    done += count
                    line.update(done)

                written = container.compress(reader, writer, model, progress=progress)
            partial.rename(target)
        except OSError as error:
            raise OSError(f'{target}: {atomic.cannot_write(error)}') from None
        finally:
            partial.unlink(missing_ok=True)
    seconds = time.monotonic() - begin
    metrics = {
        'compressed_bytes/file': float(written),
        'bits_per_byte/file': 8 * written / max(size, 1),
        'mb_per_s/file': size / seconds / 1e6,
    }
    Console().print(
        f'{target}: {written:,} bytes from {size:,}, {metrics["bits_per_byte/file"]:.3f} bits per '
        f'byte, {metrics["mb_per_s/file"]:.2f} MB/s',
        highlight=False,
    )
    return metrics
