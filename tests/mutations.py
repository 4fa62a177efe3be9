"""Files changed as damage and malice change them: by chance, but the same in every run."""

import copy
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

HUGE = [2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64, 10**30]
JUNK: list[Any] = [None, True, False, -1, 0, 1, 7, 0.5, 1e300, '', 'a', '..', '/etc/passwd', '(']
JUNK += ['../../x', '\ud800', [], {}, [[]], [1] * 50, {'a': {}}, *HUGE]
# Written as such, since `json` would not.
RAW = [b'1e999', b'NaN', b'-Infinity', b'9' * 5000, b'[' * 100_000, b'{"a":' * 100_000]


def flipped(data: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, removed or repeated, a large number written over, or the end missing."""
    changed = bytearray(data or b'\0')
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(changed)) if changed else 0
        match draw.randrange(6):
            case 0 if changed:
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                del changed[at : at + draw.randint(1, 9)]
            case 2:
                changed[at:at] = changed[at : at + draw.randint(1, 40)]
            case 3:
                number = draw.choice(HUGE) & (2**64 - 1)
                changed[at : at + 8] = number.to_bytes(8, draw.choice(['little', 'big']))
            case 4:
                changed[at:at] = draw.randbytes(draw.randint(1, 8))
            case 5:
                del changed[at:]
    return bytes(changed)


def json_text(data: bytes, draw: random.Random) -> bytes:
    """Fields of a JSON file removed, exchanged, or given another value of any kind."""
    document = copy.deepcopy(json.loads(data))
    raw = None
    for _ in range(draw.randint(1, 3)):
        places = list(_places(document))
        if not places:
            break
        *path, last = draw.choice(places)
        owner = document
        for key in path:
            owner = owner[key]
        match draw.randrange(5):
            case 0:
                del owner[last]
            case 1 if isinstance(owner, dict):
                owner[draw.choice(['a', 'kind', 'format', '..'])] = draw.choice(JUNK)
            case 2:
                owner[last] = copy.deepcopy(
                    _at(document, draw.choice(places[: len(places) // 2 + 1]))
                )
            case 3 if raw is None:
                raw, owner[last] = draw.choice(RAW), '@'
            case _:
                owner[last] = draw.choice(JUNK)
    return json.dumps(document).encode().replace(b'"@"', raw or b'"@"')


def _places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, child in (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    ):
        yield (*path, key)
        yield from _places(child, (*path, key))


def _at(document: Any, path: tuple[Any, ...]) -> Any:
    try:
        for key in path:
            document = document[key]
    except (KeyError, IndexError, TypeError):  # removed meanwhile
        return None
    return document


def json_lines(data: bytes, draw: random.Random) -> bytes:
    """One of the lines is another object, or the bytes are others."""
    lines = data.splitlines()
    if draw.random() < 0.3:
        return flipped(data, draw)
    i = draw.randrange(len(lines))
    lines[i] = json_text(lines[i], draw)
    return b'\n'.join(lines)


def npy(data: bytes, draw: random.Random) -> bytes:
    """An array's header says something else, or its values are others."""
    length = 10 + struct.unpack('<H', data[8:10])[0]
    head, values = data[10:length].decode('latin-1').rstrip(), data[length:]
    match draw.randrange(5):
        case 0:
            return data[:length] + flipped(values, draw)
        case 1:
            size = draw.choice([*HUGE, 0, -1, -(2**62)])
            shape = draw.choice([f'({size},)', f'({size}, {size})', '()', f'({size}', "'x'"])
            head = head[: head.index("'shape'")] + f"'shape': {shape}, }}"
        case 2:
            kind = draw.choice(["'|O'", "'<i8'", "'<f4'", "'<U9999999'", "'|V0'", '[("a", "<i8")]'])
            head = head.replace(head.split(',')[0], "{'descr': " + kind)
        case 3:
            head = draw.choice(['(' * 9000, '{' + '[' * 5000, '', "__import__('os')", '-' * 9000])
        case 4:
            return flipped(data[:length], draw) + values
    text = head.encode('latin-1', 'replace') + b'\n'
    return data[:8] + struct.pack('<H', len(text)) + text + values


def npz(data: bytes, draw: random.Random) -> bytes:
    """One array of an archive changed, checksums made to fit; or a bomb; or the archive itself."""
    if draw.random() < 0.2:
        return flipped(data, draw)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = draw.choice(list(members))
    choice = draw.randrange(8)
    if choice == 0:
        del members[name]
    elif choice == 1:
        members[name] = members[draw.choice(list(members))]
    elif choice == 2:
        members[f'../{name}'] = members[name]
    elif choice == 3:  # a great many zeros
        head = b"{'descr': '<u4', 'fortran_order': False, 'shape': (20000000,), }\n"
        length = struct.pack('<H', len(head))
        members[name] = b'\x93NUMPY\x01\0' + length + head + bytes(80_000_000)
    else:
        members[name] = npy(members[name], draw)
    file = io.BytesIO()
    method = draw.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_LZMA])
    method = zipfile.ZIP_DEFLATED if choice == 3 else method
    with zipfile.ZipFile(file, 'w', method, compresslevel=1) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return file.getvalue()


def container(data: bytes, draw: random.Random) -> bytes:
    """Numbers of a container changed, with CRCs that fit."""
    if draw.random() < 0.2:
        return flipped(data, draw)
    changed = bytearray(data)
    regions = [(0, 82)]  # of the numbers that a CRC of 4 bytes follows: the header, each table
    at = 86
    while at < len(data):
        (count,) = struct.unpack_from('<I', data, at)
        size = 4 + (16 * count if count else 8)
        regions.append((at, at + size))
        at += (
            size + 4 + sum(struct.unpack_from('<I', data, at + 8 + 16 * i)[0] for i in range(count))
        )
    start, stop = draw.choice(regions)
    place = draw.choice([10, 14] if not start else range(start, stop, 4))
    number = draw.choice([0, 1, 2, 255, 4096, 2**18, 2**30, *HUGE]) & (2**32 - 1)
    changed[place : place + 4] = number.to_bytes(4, 'little')
    if not start and draw.random() < 0.3:
        changed[draw.randrange(8, 82)] ^= 1 << draw.randrange(8)
    changed[stop : stop + 4] = struct.pack('<I', zlib.crc32(changed[start:stop]))
    return bytes(changed)
