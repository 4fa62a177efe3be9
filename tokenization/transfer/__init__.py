"""Tokenizer transfer: heuristics, hypernetworks, sampled and dynamic vocabularies."""
