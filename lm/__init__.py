"""The language-model core: pure functions over pytrees.

Shape suffixes, used in the names of arrays and of parameter leaves everywhere:

    B batch          L query length     S key length        N layers
    D model width    H query heads      K key/value heads   C head channels
    F feed-forward   V vocabulary       T tokens, or nodes of a draft tree
    W window bits, or words of 32 packed bits
    M rows of a batch that were picked from another
    Q codebooks      R packed rows of a shuffle buffer
    U tokens that get rows of a table, P pieces of a token, E rows of several tables joined
    G query heads that share a KV head, R = L G rows of queries, I int32 fields of such a row
    J blocks listed by a sparse index, X partial results to be merged

`x_BLD` is an array of shape [B, L, D]; a leaf `wq_NDHC` has shape [N, D, H, C].
"""
