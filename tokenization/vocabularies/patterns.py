"""Regular expressions that split text into pretokens, the words that no token crosses.

They are those of released models, written for engines with Unicode classes (`regex`, `tokenizers`,
`tiktoken`), not for Python's `re`:

    GPT2_PATTERN     tiktoken's `gpt2`, `r50k_base` and `p50k_base`
    CL100K_PATTERN   tiktoken's `cl100k_base` (GPT-4); Llama 3 splits alike
    O200K_PATTERN    tiktoken's `o200k_base` (GPT-4o)

>>> import regex
>>> regex.findall(GPT2_PATTERN, "Don't stop 12345!")
['Don', "'t", ' stop', ' 12345', '!']
>>> regex.findall(CL100K_PATTERN, "Don't stop 12345!")
['Don', "'t", ' stop', ' ', '123', '45', '!']
>>> regex.findall(O200K_PATTERN, "Don't stop 12345!")
["Don't", ' stop', ' ', '123', '45', '!']
"""

# Contractions, words and numbers with the space before them, punctuation, white space.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Numbers in groups of at most three digits.
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)

# Words also end where an upper-case letter follows a lower-case one.
_UPPER, _LOWER = r'\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}', r'\p{Ll}\p{Lm}\p{Lo}\p{M}'
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = (
    rf'[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}'
    rf'|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}'
    r'|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
