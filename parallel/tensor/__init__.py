"""Tensor parallelism: products whose kernels lie over devices, and how they overlap with what they need from others.

    config.py      what a run says, free of JAX
    gathered.py    all-gather -> column products, row product -> reduce-scatter
    ring.py        the same as collective matmuls: rings of steps that multiply and send at once
    vocabulary.py  a table of embeddings, and sums over a vocabulary, that lie over devices
    by_hand.py     these as what a model asks of tokens and kernels (`jaxpar.models.shards.Whole`)

All but the configuration run inside a `jax.shard_map` that is manual over the tensor axis.
"""
