"""The language-model core: pure functions over pytrees.

Shape suffixes, used in the names of arrays and of parameter leaves. A letter has one meaning; rooms
in brackets are the only ones that use it.

    A  alternatives for one place: children of a node, most probable tokens (decoding, experiments)
    B  batch
    C  channels of a head
    D  model width
    E  another width: of joined tables, of a projection, of a flattened side of a matrix
    F  width of a feed-forward network
    G  query heads that share a key/value head (lm, experiments)
    H  query heads
    I  int32 fields of a row of queries (lm/kernels)
    J  blocks: of a vocabulary, of keys in a sparse index; windows of a text
    K  key/value heads
    L  query length, or length of a text
    M  rows picked from an array, or nodes on one level of a tree
    N  layers
    O  tokens of a block of the vocabulary
    P  parts in order: pieces of a token, nodes of a path
    Q  codebooks (lm)
    R  rows of no batch: R = L G queries, packed rows of a data set, rows of counts, sets of tokens
    S  key length, or rows of a memory
    T  tokens, steps, or nodes of a draft tree
    U  tokens that get rows of a table (tokenization, experiments)
    V  vocabulary
    W  words of packed bits: 32 of a mask, 16 or 8 of a code
    X  partial results to be merged (lm/kernels)
    Y  substrings of words (tokenization)
    Z  limbs of a large integer (tokenization)

`x_BLD` is an array of shape [B, L, D]; a leaf `wq_NDHC` has shape [N, D, H, C]. A digit is a size:
`lse_BH1L`.
"""
