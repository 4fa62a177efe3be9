"""Between raw bytes and the symbols that a model reads and writes."""

from tokenization.tokenizer import Tokenizer as Tokenizer
from tokenization.tokenizer import load as load
