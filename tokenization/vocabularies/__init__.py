"""Vocabularies: one file per way to segment text into tokens."""
