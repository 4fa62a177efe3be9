"""Reads and writes checkpoints in Hugging Face's format."""
