"""Two processes train on the same batch as one: they share its rows and its tokenizer."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np

from lm.devices import mesh
from lm.training import train
from tokenization.transfer.sampled_batches import SampledBatches, Settings
from tokenization.vocabularies.byte import ByteTokenizer

SETTINGS = Settings(
    batch_size=4, length=8, text_bytes=60, vocab_size=300, pieces=3, steps=20, seed=5
)
DOCUMENTS = [bytes(range(97 + i, 105 + i)) * 20 for i in range(12)]


def main(port: str, index: int) -> None:
    """One of two processes: compares all devices' data with the batch of one process."""
    jax.distributed.initialize(f'localhost:{port}', 2, index)
    half = SETTINGS._replace(batch_size=2, shard_index=index, shard_count=2)
    batch = train.put(SampledBatches(DOCUMENTS, ByteTokenizer(), half)[3], mesh.make())
    whole = SampledBatches(DOCUMENTS, ByteTokenizer(), SETTINGS)[3]
    assert batch['pieces'].shape == (301, 3)
    for name, x in batch.items():
        want = whole['pieces'].array if name == 'pieces' else whole[name]
        assert x.shape == want.shape, name
        for part in x.addressable_shards:
            np.testing.assert_array_equal(part.data, want[part.index], name)


def test_two_processes_hold_the_batch_of_one():
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, 'PYTHONPATH': os.getcwd(), 'JAX_PLATFORMS': 'cpu'}
    environment['XLA_FLAGS'] = ''  # one device each
    processes = [
        subprocess.Popen([sys.executable, __file__, port, str(i)], env=environment)
        for i in range(2)
    ]
    try:
        assert [process.wait(timeout=100) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


if __name__ == '__main__':
    main(sys.argv[1], int(sys.argv[2]))
