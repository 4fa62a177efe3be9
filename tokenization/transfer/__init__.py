"""Tables for another tokenizer: heuristics, hypernetworks, sampled and dynamic vocabularies."""
