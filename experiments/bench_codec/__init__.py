"""Speed of the compiled Equal-Info codec, beside tiktoken."""
