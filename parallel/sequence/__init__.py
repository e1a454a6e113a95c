"""Attention over a sequence that lies along a mesh axis. Start at `api.sequence_attention`.

layouts   which tokens each device holds, and which blocks of the mask are empty
merge     partial results over parts of the keys, merged in float32
ring      keys travel, one way or both          gradient  the backward ring of every kind of ring
rsa       two rings: keys for the scores, then values
tokenring queries travel, partial results travel back
ulysses   all-to-all: sequence shards become head shards; alone, or around a ring
choose    bytes on each link, and which kind suits (free of JAX, as `layouts` is)
"""
