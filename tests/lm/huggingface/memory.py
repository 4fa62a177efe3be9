"""Measures memory and time of loading a checkpoint, and prints them as JSON.

    PYTHONPATH=. python tests/lm/huggingface/memory.py [DEVICES] [FEED_FORWARD]

Writes a Llama of several hundred MB in shards of about 64 MB to a temporary folder, loads it on
DEVICES CPU devices, and subtracts from the process's peak memory its memory before loading and the
parameters, which on a CPU are in the same memory. `ratio` is the remainder divided by the size of
the largest shard. Linux only.
"""

import json
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np

from lm.huggingface import checkpoint as huggingface
from lm.huggingface import config as huggingface_config
from lm.huggingface import safetensors_files, weight_map
from lm.huggingface.families import FAMILIES
from lm.huggingface.safetensors_files import LazyTensor
from lm.model.config import Config

SHARD = 1 << 26
BF16 = safetensors_files.DTYPES['BF16']


def write(folder: pathlib.Path, config: Config) -> int:
    """Writes a checkpoint of zeros; returns the size of its largest file."""
    slices = weight_map.leaf_slices(config, FAMILIES[0])
    tensors = {
        name: LazyTensor(BF16, part.shape, lambda shape=part.shape: np.zeros(shape, BF16))
        for name, part in slices.items()
    }
    folder.mkdir()
    safetensors_files.write_folder(folder, tensors, SHARD)
    described = huggingface_config.write(config, FAMILIES[0])
    (folder / 'config.json').write_text(json.dumps(described))
    return max(file.stat().st_size for file in folder.iterdir())


def memory(field: str) -> int:
    """Returns this process's resident memory in bytes, now (VmRSS) or at its peak (VmHWM)."""
    status = pathlib.Path('/proc/self/status').read_text()
    return 1024 * int(status.partition(f'{field}:')[2].split()[0])


def main(devices: str = '1', feed_forward: str = '4096') -> None:
    """Runs the measurement."""
    jax.config.update('jax_num_cpu_devices', int(devices))
    dtypes = {'dtype': 'bfloat16', 'param_dtype': 'bfloat16'}
    sizes = {'d_model': 1024, 'n_layers': 6, 'n_heads': 8, 'n_kv_heads': 8, 'head_dim': 128}
    config = Config(16_384, **sizes, d_ff=int(feed_forward), **dtypes)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        write(folder / 'small', Config(256, 8, 1, 1, 1, 8, 8, **dtypes))
        largest = write(folder / 'large', config)
        huggingface.load(folder / 'small')  # allocates JAX's own memory
        before, begin = memory('VmRSS'), time.perf_counter()
        _, params = huggingface.load(folder / 'large')
        seconds = time.perf_counter() - begin
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    beside = memory('VmHWM') - before - size
    figures = {
        'parameters_mb': size / 1e6, 'largest_shard_mb': largest / 1e6, 'beside_mb': beside / 1e6,
        'ratio': beside / largest, 'seconds': seconds,
    }  # fmt: skip
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == '__main__':
    main(*sys.argv[1:])
