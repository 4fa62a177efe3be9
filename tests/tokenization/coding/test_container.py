"""Containers: round trips, and every way to damage one ends in an error that says what is wrong."""

import io
import pathlib
import subprocess
import sys
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from tests.tokenization import toy
from tokenization.coding import container
from tokenization.coding.container import ContainerError

MODEL = toy.table_model()
LANES, CHUNK = 4, 40
TEXT = toy.sample(MODEL, 5 * CHUNK + 7)  # two groups, the second not full


def pack(text: bytes) -> bytes:
    return container.pack(text, MODEL, lanes=LANES, chunk=CHUNK)


PACKED = pack(TEXT)


class Pipe(io.BytesIO):
    """Gives and takes a few bytes at a time, and cannot seek."""

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None and size >= 0, 'reading to the end is not bounded memory'
        return super().read(min(size, 11))

    def seek(self, *args: Any) -> int:
        raise OSError('a pipe')


@hypothesis.given(st.binary(max_size=3 * LANES * CHUNK))
@hypothesis.example(b'')
@hypothesis.example(b'\0' * (LANES * CHUNK))
def test_round_trip(text):
    assert container.unpack(pack(text), MODEL) == text


def test_float_model_round_trip():
    model = toy.float_model(context=30)
    text = TEXT + bytes(range(256))
    packed = container.pack(text, model, lanes=LANES, chunk=CHUNK)
    assert container.unpack(packed, model) == text


def test_another_process_reads_a_float_models_container(tmp_path):
    """Nothing but the file and the seed of the model goes over: the program is compiled again."""
    text = TEXT[: 2 * CHUNK + 3]
    packed = container.pack(text, toy.float_model(context=30), lanes=LANES, chunk=CHUNK)
    (tmp_path / 'packed').write_bytes(packed)
    program = (
        'import pathlib, sys\n'
        'from tests.tokenization import toy\n'
        'from tokenization.coding import container\n'
        'folder = pathlib.Path(sys.argv[1])\n'
        "packed = (folder / 'packed').read_bytes()\n"
        "(folder / 'text').write_bytes(container.unpack(packed, toy.float_model(context=30)))\n"
    )
    root = pathlib.Path(__file__).parents[3]
    subprocess.run([sys.executable, '-c', program, str(tmp_path)], check=True, cwd=root)
    assert (tmp_path / 'text').read_bytes() == text


def test_pipes_and_progress():
    packed, seen = io.BytesIO(), []
    size = container.compress(
        Pipe(TEXT), packed, MODEL, lanes=LANES, chunk=CHUNK, progress=seen.append
    )
    assert packed.getvalue() == PACKED and size == len(PACKED) and sum(seen) == len(TEXT)
    text = io.BytesIO()
    assert container.decompress(Pipe(PACKED), text, MODEL) == len(TEXT)
    assert text.getvalue() == TEXT


def test_header_says_what_is_needed():
    header = container.read_header(io.BytesIO(PACKED))
    assert header[:4] == (14, LANES, CHUNK, MODEL.digest)
    assert header.made_with.startswith('cpu, jax ')


def test_every_truncation_is_noticed():
    for size in range(1, len(PACKED)):
        with pytest.raises(ContainerError, match='truncated'):
            container.unpack(PACKED[:size], MODEL)


@hypothesis.given(st.integers(0, len(PACKED) - 1), st.integers(1, 255))
@hypothesis.settings(max_examples=200)
def test_every_flipped_byte_is_noticed(index, flip):
    damaged = bytearray(PACKED)
    damaged[index] ^= flip
    with pytest.raises(ContainerError):
        container.unpack(bytes(damaged), MODEL)


@pytest.mark.parametrize(
    ('damaged', 'message'),
    [
        (b'', 'not a Tessera container'),
        (b'PK\x03\x04 something else', 'not a Tessera container'),
        (PACKED[:8] + b'\x02' + PACKED[9:], 'version 2; this program reads 1'),
        (PACKED[:20] + b'?' + PACKED[21:], 'the header is damaged'),
        (PACKED[:-14] + b'?' + PACKED[-13:], 'the table after chunk 6 is damaged'),
        (PACKED + b'\0', 'follow the trailer'),
        (PACKED + PACKED, 'follow the trailer'),
    ],
)
def test_errors_name_the_place(damaged, message):
    with pytest.raises(ContainerError, match=message):
        container.unpack(damaged, MODEL)


def test_a_damaged_code_names_its_chunk_and_writes_nothing_of_its_group():
    damaged = bytearray(PACKED)
    damaged[-17] ^= 1  # the last byte of the last code, before the trailer of 16
    text = io.BytesIO()
    with pytest.raises(ContainerError, match='chunk 5: its code is damaged'):
        container.decompress(io.BytesIO(bytes(damaged)), text, MODEL)
    assert text.getvalue() == TEXT[: LANES * CHUNK]


def test_another_model_is_refused_and_both_are_named():
    other = toy.table_model(seed=1)
    with pytest.raises(ContainerError, match=rf'(?s){MODEL.digest}.*{other.digest}.*made with'):
        container.unpack(PACKED, other)


def test_other_probabilities_under_the_same_digest_are_noticed():
    """A float model on another machine: the code is sound, the text would be wrong."""
    other = toy.table_model(seed=1)._replace(digest=MODEL.digest)
    with pytest.raises(ContainerError, match=r'chunk 0.*probabilities computed here differ'):
        container.unpack(PACKED, other)


def test_lost_groups_are_noticed():
    first = len(pack(TEXT[: LANES * CHUNK])) - 16
    start = len(pack(b'')) - 16
    with pytest.raises(ContainerError, match='groups are lost'):
        container.unpack(PACKED[:start] + PACKED[first:], MODEL)


@pytest.mark.parametrize(('lanes', 'chunk'), [(0, 1), (1, 0), (2**20, 2**20)])
def test_sizes_out_of_range_are_refused(lanes, chunk):
    with pytest.raises(ValueError, match=f'lanes {lanes}, chunk {chunk}'):
        container.pack(b'', MODEL, lanes=lanes, chunk=chunk)
