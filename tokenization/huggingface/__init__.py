"""Tokenizers of other projects' files, and how they are converted."""
