"""Tokenizers in the file formats of Hugging Face and SentencePiece, made lossless."""
