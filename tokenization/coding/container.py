"""The `.tess` file format: arithmetic-coded text with checksums and the digest of its model.

    header   magic, version | precision, lanes, chunk size, model digest, made with | CRC
    group    count > 0, then per chunk: text bytes, code bytes, CRC of the text, CRC of the code
             | CRC of these numbers | the codes
    ...
    trailer  count = 0, text bytes in all | CRC

All numbers are little-endian, all CRCs are CRC-32. The text is cut into chunks of one size (the
last may be shorter), and each is coded by itself; `lanes` of them make a group, one batch of the
model. Every CRC is checked before the data is used, and decoded text is written only if it has the
CRC of the original. Memory is bounded by a group, not by the length of the file.
"""

import io
import math
import struct
import zlib
from typing import BinaryIO, NamedTuple

import jax

from tokenization.coding import byte_coder
from tokenization.coding.byte_coder import Progress
from tokenization.coding.next_byte import NextByteModel

MAGIC = b'\x89TESSERA'
VERSION = 1

_START = struct.Struct('<8sB')
_FIELDS = struct.Struct('<BII32s32s')
_COUNT = struct.Struct('<I')
_CHUNK = struct.Struct('<IIII')
_TOTAL = struct.Struct('<Q')
_CRC = struct.Struct('<I')
_GROUP_LIMIT = 1 << 30
_LANES_LIMIT = 4096


class ContainerError(ValueError):
    """The file is foreign, damaged or truncated, or needs another model."""


class Header(NamedTuple):
    """The header of a container.

    Attributes:
      precision: bits of the CDF.
      lanes: chunks in a group; the batch size of the model, on both sides.
      chunk: text bytes in a chunk.
      digest: hex SHA-256, `NextByteModel.digest` of the model that wrote it.
      made_with: backend and JAX version that wrote it; to decode, a float model may need both.
    """

    precision: int
    lanes: int
    chunk: int
    digest: str
    made_with: str


class _Entry(NamedTuple):
    text: int
    code: int
    text_crc: int
    code_crc: int


def compress(
    reader: BinaryIO,
    writer: BinaryIO,
    model: NextByteModel,
    *,
    lanes: int = 64,
    chunk: int = 4096,
    progress: Progress | None = None,
) -> int:
    """Reads text to its end and writes a container; returns the number of bytes written.

    Args:
      reader: any bytes; need not seek.
      writer: a file that gets its final name only after this function has returned.
      model: gives the probabilities; needed again to read the container.
      lanes: chunks coded at once.
      chunk: bytes in a chunk; the model starts afresh in each.
      progress: called with the number of text bytes coded since its last call.

    Raises:
      ValueError: lanes or chunk are out of range.
    """
    if not _fits(lanes, chunk):
        raise ValueError(
            f'lanes {lanes}, chunk {chunk}: expected 1 or more each, at most {_LANES_LIMIT} lanes '
            f'and {_GROUP_LIMIT} bytes in a group'
        )
    header = Header(model.precision, lanes, chunk, model.digest, _made_with())
    total, written = 0, _write(writer, _pack_header(header))
    while text := _read(reader, lanes * chunk):
        chunks = [text[start : start + chunk] for start in range(0, len(text), chunk)]
        codes = byte_coder.encode_bytes(model, chunks, batch=lanes, progress=progress)
        table = _COUNT.pack(len(chunks)) + b''.join(
            _CHUNK.pack(len(piece), len(code), zlib.crc32(piece), zlib.crc32(code))
            for piece, code in zip(chunks, codes)
        )
        written += _write(writer, _with_crc(table) + b''.join(codes))
        total += len(text)
    return written + _write(writer, _with_crc(_COUNT.pack(0) + _TOTAL.pack(total)))


def decompress(
    reader: BinaryIO,
    writer: BinaryIO,
    model: NextByteModel,
    *,
    progress: Progress | None = None,
) -> int:
    """Reads a container to its end and writes its text; returns the number of bytes written.

    Every byte written has been checked, but an error may follow it: give the result its final name
    only after this function has returned.

    Args:
      reader: positioned at the first byte of the container; need not seek.
      writer: receives the text.
      model: the model that the container was made with.
      progress: called with the number of text bytes decoded since its last call.

    Raises:
      ContainerError: the container is foreign, damaged or truncated, was made with another model,
        or this machine computes different probabilities than the one that made it.
    """
    header = read_header(reader)
    if header.digest != model.digest or header.precision != model.precision:
        raise ContainerError(
            f'this file was made with the model {header.digest} at {header.precision} bits, but '
            f'the given model is {model.digest} at {model.precision} bits; decompress it with the '
            'model that it was made with'
        )
    total = done = 0
    while entries := _read_table(reader, header, done):
        codes = []
        for number, entry in enumerate(entries, start=done):
            code = _read_exactly(reader, entry.code, f'the code of chunk {number}')
            if zlib.crc32(code) != entry.code_crc:
                raise ContainerError(f'chunk {number}: its code is damaged (CRC differs)')
            codes.append(code)
        lengths = [entry.text for entry in entries]
        texts = byte_coder.decode_bytes(
            model, codes, lengths, batch=header.lanes, progress=progress
        )
        for number, (text, entry) in enumerate(zip(texts, entries), start=done):
            if zlib.crc32(text) != entry.text_crc:
                raise ContainerError(
                    f'chunk {number}: the decoded text is not the original, although its code is '
                    'undamaged: the probabilities computed here differ from those at '
                    f'encoding. Made with {header.made_with}; this is {_made_with()}'
                )
            total += _write(writer, text)
        done += len(entries)
    _check_end(reader, total)
    return total


def pack(data: bytes, model: NextByteModel, *, lanes: int = 64, chunk: int = 4096) -> bytes:
    """Returns the container of `data`; see `compress`."""
    writer = io.BytesIO()
    compress(io.BytesIO(data), writer, model, lanes=lanes, chunk=chunk)
    return writer.getvalue()


def unpack(container: bytes, model: NextByteModel) -> bytes:
    """Returns the text of a container; raises ContainerError as `decompress` does."""
    writer = io.BytesIO()
    decompress(io.BytesIO(container), writer, model)
    return writer.getvalue()


def read_header(reader: BinaryIO) -> Header:
    """Reads the header; raises ContainerError if it is damaged or of an unknown version."""
    start = _read(reader, _START.size)
    if start[: len(MAGIC)] != MAGIC[: len(start)] or not start:
        raise ContainerError(
            f'not a Tessera container: it starts with {start[: len(MAGIC)]!r}, expected {MAGIC!r}'
        )
    if len(start) < _START.size:
        raise ContainerError('truncated within its header')
    version = start[-1]
    if version != VERSION:
        raise ContainerError(f'container version {version}; this program reads {VERSION}')
    rest = _read_exactly(reader, _FIELDS.size + _CRC.size, 'its header')
    _check_crc(start + rest, 'the header')
    precision, lanes, chunk, digest, made_with = _FIELDS.unpack(rest[: _FIELDS.size])
    if not _fits(lanes, chunk):
        raise ContainerError(f'header: {lanes} lanes of {chunk} bytes are out of range')
    return Header(
        precision, lanes, chunk, digest.hex(), made_with.rstrip(b'\0').decode('ascii', 'replace')
    )


def _fits(lanes: int, chunk: int) -> bool:
    return 1 <= lanes <= _LANES_LIMIT and chunk >= 1 and lanes * chunk <= _GROUP_LIMIT


def _pack_header(header: Header) -> bytes:
    fields = _FIELDS.pack(
        header.precision,
        header.lanes,
        header.chunk,
        bytes.fromhex(header.digest),
        header.made_with.encode('ascii', 'replace')[:32],
    )
    return _with_crc(_START.pack(MAGIC, VERSION) + fields)


def _read_table(reader: BinaryIO, header: Header, done: int) -> list[_Entry]:
    """Returns the entries of the next group; none at the trailer, whose count alone is read."""
    where = f'the table after chunk {done}'
    head = _read_exactly(reader, _COUNT.size, where)
    (count,) = _COUNT.unpack(head)
    if count > header.lanes:
        raise ContainerError(f'{where} is damaged: {count} chunks in a group of {header.lanes}')
    if not count:
        return []
    table = _read_exactly(reader, count * _CHUNK.size + _CRC.size, where)
    _check_crc(head + table, where)
    entries = [_Entry(*fields) for fields in _CHUNK.iter_unpack(table[: -_CRC.size])]
    # The other 255 byte values have a frequency of at least 1 each, and an interval of at least
    # 2**16 is rounded by at most 1. So no byte costs fewer bits than this, and a short code cannot
    # declare a long text.
    least = -math.log2(1 - 254 / 2 ** max(header.precision, 8))
    for entry in entries:
        # A byte costs at most 16 bits, and the end of a code 17.
        cheap = entry.text * least > 8 * entry.code + 32
        if entry.text > header.chunk or entry.code > 2 * entry.text + 3 or cheap:
            raise ContainerError(f'{where}: {entry.text} bytes in {entry.code} are out of range')
    return entries


def _check_end(reader: BinaryIO, total: int) -> None:
    trailer = _read_exactly(reader, _TOTAL.size + _CRC.size, 'its trailer')
    _check_crc(_COUNT.pack(0) + trailer, 'the trailer')
    (expected,) = _TOTAL.unpack(trailer[: _TOTAL.size])
    if total != expected:
        raise ContainerError(
            f'{total} bytes of text, but the trailer says {expected}: groups are lost'
        )
    if reader.read(1):
        raise ContainerError('bytes follow the trailer: the file holds more than a container')


def _made_with() -> str:
    return f'{jax.default_backend()}, jax {jax.__version__}'


def _with_crc(data: bytes) -> bytes:
    return data + _CRC.pack(zlib.crc32(data))


def _check_crc(data: bytes, what: str) -> None:
    (expected,) = _CRC.unpack(data[-_CRC.size :])
    if zlib.crc32(data[: -_CRC.size]) != expected:
        raise ContainerError(f'{what} is damaged (CRC differs)')


def _write(writer: BinaryIO, data: bytes) -> int:
    writer.write(data)  # not every writer returns a count
    return len(data)


def _read(reader: BinaryIO, size: int) -> bytes:
    """Returns `size` bytes, or fewer at the end; a pipe may return fewer per read."""
    parts = []
    while size and (part := reader.read(size)):
        parts.append(part)
        size -= len(part)
    return b''.join(parts)


def _read_exactly(reader: BinaryIO, size: int, what: str) -> bytes:
    data = _read(reader, size)
    if len(data) < size:
        raise ContainerError(f'truncated within {what}: {len(data)} of {size} bytes')
    return data
