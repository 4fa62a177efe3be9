"""One row per reader of files: how a test makes its files, changes them and reads them."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.byte_models import open_byte_model
from experiments.speculative import prompts
from lm.checkpoints import bundle
from lm.huggingface import checkpoint as huggingface
from tests import foreign_files as files
from tests import mutations
from tokenization.coding import container

Path = pathlib.Path
Mutate = Callable[[bytes, Any], bytes]


class Loader(NamedTuple):
    """A reader of files.

    Attributes:
      make: writes a sound folder.
      load: reads the folder, and uses the result.
      files: name of a file -> how it is changed.
      inputs: number of changed folders to try.
      sign: updates the folder's checksums of itself, so that changes get past them.
      refuses: whether damage raises an error; if not, damaged files are written anew.
      threads: whether threads other than Python's read. If they allocate while tracemalloc stops,
        it ends the process.
    """

    make: Callable[[Path], Any]
    load: Callable[[Path], Any]
    files: dict[str, Mutate]
    inputs: int
    sign: Callable[[Path], Any] = lambda folder: None
    refuses: bool = True
    threads: bool = False


FLIPPED, JSON, LINES = mutations.flipped, mutations.json_text, mutations.json_lines
NPZ = mutations.npz


def loaders() -> dict[str, Loader]:
    """Returns all readers, by name."""
    # Bundles come last: after a failed restore, Orbax may go on reading for a moment.
    return {**_of_tokenizers(), **_of_vocabularies(), **_of_data(), **_of_models()}


def _of_tokenizers() -> dict[str, Loader]:
    described = {
        f'{kind}/tessera.json': Loader(make, files.use_tokenizer, {'tessera.json': JSON}, 40)
        for kind, make in files.TOKENIZERS.items()
    }
    return described | {
        'huggingface/tessera.json': Loader(
            files.make_saved_huggingface,
            files.use_tokenizer,
            {'tessera.json': JSON, 'tokenizer.json': FLIPPED},
            20,
        ),
        'bpe/ranks': Loader(
            files.TOKENIZERS['bpe'], files.use_tokenizer, {'ranks.tiktoken': FLIPPED}, 30
        ),
        'tiktoken': Loader(files.make_ranks, files.use_ranks, {'x.tiktoken': FLIPPED}, 30),
        'equal_info/table.npz': Loader(
            files.make_equal_info, files.use_tokenizer, {'table.npz': NPZ}, 80, files.sign_table
        ),
        'string_table': Loader(
            files.make_string_table,
            files.use_tokenizer,
            {'strings.bin': FLIPPED, 'sizes.bin': FLIPPED},
            60,
            files.sign_strings,
        ),
        'ngram': Loader(
            files.make_ngram,
            open_byte_model,
            {'ngram.npz': NPZ, 'ngram.json': JSON},
            80,
            files.sign_ngram,
        ),
    }


def _of_vocabularies() -> dict[str, Loader]:
    return {
        'gpt2': Loader(
            files.make_vocabulary,
            files.use_folder,
            {
                'vocab.json': JSON,
                'merges.txt': FLIPPED,
                'tokenizer_config.json': JSON,
                'special_tokens_map.json': JSON,
            },
            60,
        ),
        'sentencepiece': Loader(
            files.make_sentencepiece,
            files.use_folder,
            {'tokenizer.model': FLIPPED, 'added_tokens.json': JSON},
            60,
        ),
        'container': Loader(
            files.make_container,
            lambda folder: container.unpack((folder / 'x').read_bytes(), files.MODEL),
            {'x': mutations.container},
            60,
        ),
    }


def _of_data() -> dict[str, Loader]:
    return {
        'encoded': Loader(
            files.make_encoded,
            files.use_encoded,
            {'ids.npy': mutations.npy, 'offsets.npy': mutations.npy},
            120,
        ),
        'shards': Loader(
            files.make_shards,
            files.use_shards,
            {'index.json': JSON, 'train-00000-of-00001.array_record': FLIPPED},
            60,
            threads=True,
        ),
        'run': Loader(files.make_run, files.use_run, {'started.json': JSON, 'part.json': JSON}, 60),
        'curve': Loader(files.make_curve, files.use_curve, {'curve.json': JSON}, 60, refuses=False),
        'metrics': Loader(
            files.make_metrics, files.use_metrics, {'metrics.jsonl': LINES}, 60, refuses=False
        ),
        'questions': Loader(
            files.make_questions,
            lambda f: prompts.read_questions(f / 'question.jsonl'),
            {'question.jsonl': LINES},
            60,
        ),
    }


def _of_models() -> dict[str, Loader]:
    return {
        'safetensors': Loader(
            files.make_huggingface('llama2'),
            huggingface.check,
            {'model.safetensors': FLIPPED, 'config.json': JSON},
            60,
        ),
        'safetensors/index': Loader(
            files.make_huggingface('mistral'),
            huggingface.check,
            {'model.safetensors.index.json': JSON},
            40,
        ),
        'bundle/config.json': Loader(
            files.make_bundle, bundle.load, {'config.json': JSON}, 60, threads=True
        ),
        'bundle/params': Loader(
            files.make_bundle, bundle.load, {'params': FLIPPED}, 60, threads=True
        ),
    }
