"""Decompresses one file."""

import contextlib
import time
from collections.abc import Iterator

from etils import epath
from rich.console import Console

from experiments import byte_models
from experiments.compress.config import SUFFIX
from experiments.decompress.config import Config
from lm.files import atomic
from lm.training.metrics import ProgressLine
from tokenization.coding import container


def main(config: Config, out: epath.Path) -> dict[str, float]:
    """Writes the decompressed file atomically; returns the throughput.

    Raises:
      ContainerError: the file cannot be restored exactly; the message gives the reason.
    """
    source = epath.Path(config.file)
    if config.to is None and not config.file.endswith(SUFFIX):
        raise ValueError(f'{source}: does not end in {SUFFIX}; name the output file with --to')
    target = epath.Path(config.to or config.file.removesuffix(SUFFIX))
    partial = byte_models.atomically(target)
    with _naming(source), source.open('rb') as reader:
        container.read_header(reader)  # refuses other file formats before a model is loaded
    model = byte_models.open_byte_model(config.model)
    begin = time.monotonic()
    with _naming(source), source.open('rb') as reader:
        try:
            with (
                partial.open('wb') as writer,
                ProgressLine('decompressing', source.stat().length) as line,
            ):
                size = container.decompress(
                    reader, writer, model, progress=lambda _: line.update(reader.tell())
                )
            partial.rename(target)
        except OSError as error:
            raise OSError(f'{target}: {atomic.cannot_write(error)}') from None
        finally:
            partial.unlink(missing_ok=True)
    seconds = time.monotonic() - begin
    Console().print(f'{target}: {size:,} bytes, {size / seconds / 1e6:.2f} MB/s', highlight=False)
    return {'mb_per_s/file': size / seconds / 1e6}


@contextlib.contextmanager
def _naming(source: epath.Path) -> Iterator[None]:
    try:
        yield
    except container.ContainerError as error:
        raise container.ContainerError(f'{source}: {error}') from None
