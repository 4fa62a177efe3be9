"""Files made to harm, one for each way in that was once open: refused, in no time and no memory."""

import hashlib
import io
import json
import struct
import tracemalloc
import zipfile
import zlib

import jax
import numpy as np
import pytest
import tensorstore

from lm.checkpoints import bundle
from lm.files import array_files
from lm.model import params, presets
from tests.tokenization import toy
from tokenization import loading
from tokenization.coding import container
from tokenization.coding.ngram import NGram
from tokenization.vocabularies.alphabet import AlphabetTokenizer
from tokenization.vocabularies.bpe import BPETokenizer
from tokenization.vocabularies.byte import ByteTokenizer
from tokenization.vocabularies.longest_match import Strings
from tokenization.vocabularies.table import TableTokenizer
from tokenization.vocabularies.table_files import Compiled

CONFIG = presets.tiny(40)
BYTES = [bytes([byte]) for byte in range(256)]


@pytest.fixture
def little_memory():
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6, f'{peak:,} bytes'


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / 'model'
    bundle.save(path, CONFIG, params.init(CONFIG, jax.random.key(0)), ByteTokenizer(), 39)
    return path


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.usefixtures('little_memory')
def test_four_bytes_of_code_cannot_announce_a_gigabyte_of_text():
    model = toy.table_model()
    packed = bytearray(container.pack(b'abc', model, lanes=1, chunk=20))
    struct.pack_into('<I', packed, 14, 2**30)  # the chunk's size, and its CRC
    struct.pack_into('<I', packed, 82, zlib.crc32(packed[:82]))
    struct.pack_into('<I', packed, 90, 2**30)  # the first chunk's text
    struct.pack_into('<I', packed, 106, zlib.crc32(packed[86:106]))
    with pytest.raises(container.ContainerError, match=r'1073741824 bytes in \d+ are out of range'):
        container.unpack(bytes(packed), model)


def test_a_text_of_the_likeliest_bytes_alone_is_read():
    """The bound on a code's length is the coder's own."""
    likely = np.zeros(257, np.int32)
    likely[1:] = np.arange(2**16 - 255, 2**16 + 1)  # byte 0 has all that the others leave
    model = toy.table_model(precision=16)._replace(
        cdf=lambda last_B: jax.numpy.broadcast_to(likely, (*last_B.shape, 257))
    )
    text = bytes(100_000)
    packed = container.pack(text, model, lanes=1, chunk=len(text))
    assert len(packed) < 250 and container.unpack(packed, model) == text


@pytest.mark.usefixtures('little_memory')
@pytest.mark.parametrize('alphabet', [10**10, 2**70, '9' * 9, {'a': 1}, [256], [[1]]])
def test_an_alphabet_is_a_list_of_bytes(tmp_path, alphabet):
    AlphabetTokenizer().save(tmp_path / 'x')
    edit(tmp_path / 'x' / 'tessera.json', alphabet=alphabet)
    with pytest.raises(ValueError, match='no alphabet'):
        loading.load(tmp_path / 'x')


@pytest.mark.parametrize('offsets', [[1, 2], [0, 2**40], [0, 5, 3, 4], [0, -8, 4], [], [[0]]])
def test_offsets_that_compiled_loops_would_follow_anywhere(offsets):
    with pytest.raises(ValueError, match='offsets'):
        Strings(np.zeros(4, np.uint8), np.array(offsets, np.int64))


def archive(method=zipfile.ZIP_DEFLATED, **members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', method, compresslevel=1) as opened:
        for name, content in members.items():
            opened.writestr(f'{name}.npy', content)
    return file.getvalue()


def array(header, values=b''):
    text = header.encode() + b'\n'
    return b'\x93NUMPY\x01\0' + struct.pack('<H', len(text)) + text + values


def plain(shape, kind='<u4'):
    return f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"


@pytest.mark.usefixtures('little_memory')
@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (archive(a=array(plain('(10_000_000,)'), bytes(40_000_000))), 'decompress to 40,000,0'),
        (archive(a=array(plain(f'({2**40},)'))), '0 bytes for uint32'),
        (archive(a=array(plain(f'({2**62}, {2**62})'))), '0 bytes for uint32'),
        (archive(a=array(plain('(1,)', '|O'), b'cos\nsystem\n(S"x"\ntR.')), 'array of numbers'),
        (archive(a=array('(' * 9000)), 'damaged'),
        (archive(a=array("__import__('os').system('x')")), 'damaged'),
        (archive(zipfile.ZIP_LZMA, a=array(plain('(1,)'), bytes(4))), 'does not use'),
        (archive(b=array(plain('(1,)'), bytes(4))), 'no item named'),
        (b'PK\x05\x06', 'damaged'),
    ],
)
def test_archives(data, message):
    with pytest.raises(ValueError, match=message):
        array_files.read_archive(data, ['a'], 'x.npz')


@pytest.mark.usefixtures('little_memory')
def test_a_size_that_the_archive_understates():
    """zipfile would unpack 2 GB of this before it looks at the size."""
    data = bytearray(archive(a=array(plain('(20_000_000,)'), bytes(80_000_000))))
    at = data.rindex(b'PK\x01\x02')
    struct.pack_into('<I', data, at + 24, 200)
    struct.pack_into('<I', data, 22, 200)
    tracemalloc.reset_peak()
    with pytest.raises(ValueError, match='damaged'):
        array_files.read_archive(bytes(data), ['a'], 'x.npz')


def test_an_n_gram_that_is_no_trie():
    one = np.zeros(1, np.uint32)
    counts = np.ones(1, np.uint32)
    NGram((one, one), (one, one), (counts, counts)).check()
    for children, pairs, seen in [
        ((one, np.array([0, 0], np.uint32)), (one, one), (counts, counts)),  # out of order
        ((one, np.array([256], np.uint32)), (one, one), (counts, counts)),  # of no node
        ((one, one), (one, np.array([999], np.uint32)), (counts, counts)),
        ((one, one), (one, one), (counts, one)),  # never seen
        ((one, one), (one, one), (counts, counts[:0])),
        ((counts, one), (one, one), (counts, counts)),
        ((one, one.astype(float)), (one, one), (counts, counts)),
    ]:
        with pytest.raises(ValueError, match='level'):
            NGram(children, pairs, seen).check()


@pytest.mark.parametrize('pattern', ['', '(?=a)', '(', r'(((((a*)*)*)*)*)*(?!b)\1z|(?s:.)'])
def test_a_pattern_that_breaks_its_engine(tmp_path, pattern):
    BPETokenizer(tuple(BYTES)).save(tmp_path / 'x')
    edit(tmp_path / 'x' / 'tessera.json', pattern=pattern)
    with pytest.raises(ValueError, match=r'attern|regex|Parsing'):
        loading.load(tmp_path / 'x').encode(b'a' * 40 + b'!')


def parameters(path):
    spec = {'driver': 'ocdbt', 'base': f'file://{path / "params"}/'}
    return tensorstore.KvStore.open(spec).result()


def set_header(path, **fields):
    stored = parameters(path)
    key = 'tables.input_VD/.zarray'
    header = json.loads(stored.read(key).result().value) | fields
    stored.write(key, json.dumps(header)).result()


def test_a_bundle_whose_arrays_are_larger_than_any_memory(saved):
    rows = 2**36
    described = json.loads((saved / 'config.json').read_text())
    described['model'] |= {'vocab_size': rows}
    (saved / 'config.json').write_text(json.dumps(described))
    set_header(saved, shape=[rows, 64])
    with pytest.raises(ValueError, match='bytes of parameters, params/ has'):
        bundle.load(saved)


def test_a_bundle_stored_in_pieces_larger_than_its_arrays(saved):
    set_header(saved, chunks=[2**36, 64])
    with pytest.raises(ValueError, match='stored in pieces of'):
        bundle.load(saved)


def test_an_index_of_parameters_that_names_a_file_outside(saved, tmp_path):
    """TensorStore refuses to leave the folder; should it begin to, this test says so."""
    stored = tensorstore.KvStore.open(
        {
            'driver': 'ocdbt', 'base': f'file://{tmp_path}/kv/',
            'config': {'compression': None, 'max_inline_value_bytes': 0},
        }
    ).result()  # fmt: skip
    stored.write('a', b'secret').result()
    file = next((tmp_path / 'kv' / 'd').iterdir())
    inside, outside = f'd/{file.name}'.encode(), b'../' + b'e' * 31
    data, magic = file.read_bytes(), b'\x0c\xdb\x20\xde'  # of a node, after the values
    node = data.rindex(magic)
    moved = data[:node] + _checked(data[node:].replace(inside, outside))
    (tmp_path / outside.decode().removeprefix('../')).write_bytes(moved)
    index = tmp_path / 'kv' / 'manifest.ocdbt'
    index.write_bytes(_checked(index.read_bytes().replace(inside, outside)))
    again = tensorstore.KvStore.open({'driver': 'ocdbt', 'base': f'file://{tmp_path}/kv/'}).result()
    with pytest.raises(ValueError, match='Invalid key'):
        again.read('a').result()


def _checked(data):
    """Returns the bytes with the CRC-32C of all but the last four in their place."""
    crc = 0xFFFFFFFF
    for byte in data[:-4]:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 & -(crc & 1))
    return data[:-4] + struct.pack('<I', crc ^ 0xFFFFFFFF)


def test_a_table_is_checked_beneath_its_own_digest(tmp_path):
    strings = Strings.of(BYTES)
    compiled = Compiled(16, 'tunstall', 'x')
    TableTokenizer(strings, np.ones(256, bool), compiled).save(tmp_path / 'x')
    file = io.BytesIO()
    np.savez(file, flat=strings.flat, offsets=strings.offsets * 2**30, written=np.ones(256, bool))
    (tmp_path / 'x' / 'table.npz').write_bytes(file.getvalue())
    edit(
        tmp_path / 'x' / 'tessera.json',
        table_sha256=hashlib.sha256(file.getvalue()).hexdigest(),
    )
    with pytest.raises(ValueError, match='offsets'):
        loading.load(tmp_path / 'x')
