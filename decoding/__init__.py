"""Decoding loops: from a model and a prompt to the next symbols."""
