"""Tokenizers: from raw bytes to the symbols that a model reads and writes, and back."""

from tokenization.tokenizer import Tokenizer as Tokenizer
