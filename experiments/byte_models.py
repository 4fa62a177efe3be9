"""Loads next-byte models for the file compressor, and writes its outputs atomically."""

import os

import jax
from etils import epath

from lm.checkpoints import bundle
from lm.devices import mesh
from tokenization import loading
from tokenization.coding import neural
from tokenization.coding.next_byte import NextByteModel
from tokenization.coding.ngram import NGram
from tokenization.vocabularies.byte import ByteTokenizer


def open_byte_model(path: epath.PathLike, precision: int = 16) -> NextByteModel:
    """Loads the byte n-gram, or the bundle of a byte-level LM, saved in a folder.

    Raises:
      FileNotFoundError: the folder holds neither.
      ValueError: the model is damaged, or is not over bytes.
    """
    folder = epath.Path(path)
    if not (folder / 'config.json').exists():
        if not folder.exists() or not any(folder.iterdir()):
            raise FileNotFoundError(f'{path}: no model here; `experiments.run pretrain` makes one')
        return NGram.load(folder).model(precision)
    # One device: the order of float sums, and with it the code, depends on the device count.
    loaded = bundle.load(folder, mesh.make(devices=jax.devices()[:1]))
    if not isinstance(loading.load(loaded.tokenizer_path), ByteTokenizer):
        raise ValueError(f'{path}: only a model over bytes can code a file')
    return neural.model(loaded.params, loaded.config, loaded.config.max_length - 1, precision)


def atomically(target: epath.Path) -> epath.Path:
    """Returns a temporary path beside `target`; rename it to `target` once it is complete.

    Raises:
      FileExistsError: `target` already exists.
      FileNotFoundError: the folder of `target` does not exist.
    """
    if target.exists():
        raise FileExistsError(f'{target}: exists; give another --to, or remove it')
    if not target.parent.is_dir():
        raise FileNotFoundError(f'{target.parent}: no such folder')
    return target.with_name(f'.{target.name}.{os.getpid()}.partial')
