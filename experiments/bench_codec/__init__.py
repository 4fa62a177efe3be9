"""Throughput of the compiled Equal-Info codec, compared with tiktoken."""
