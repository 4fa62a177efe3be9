"""Saves the bundle that later versions must load: `python tests/lm/checkpoints/make_bundle.py DIR`.

`old_bundle/` was written by the commit that README.md names.
"""

import sys

import jax

from lm.checkpoints import bundle
from lm.model import params
from lm.model.config import Config
from tokenization.vocabularies.byte import ByteTokenizer

CONFIG = Config(257, 4, 1, 2, 1, 2, 4, max_length=16, tied=True)
METRICS = {'bits_per_byte': 8.25}

if __name__ == '__main__':
    weights = params.init(CONFIG, jax.random.key(0))
    bundle.save(sys.argv[1], CONFIG, weights, ByteTokenizer(), 256, METRICS)
