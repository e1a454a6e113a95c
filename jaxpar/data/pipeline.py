"""Batches by position: a pure function of the configuration and a *global example index*.

Batch b of B rows holds the examples at positions b·B ... b·B + B - 1 of one endless order of examples, which is shuffled
anew in each pass. The position is all that a checkpoint must hold: the batches behind it are bitwise the same on any
mesh, any number of devices and processes, and any grouping into rows. Each process makes only the rows that its devices
hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from jaxpar.data import bigram, cache
from jaxpar.data.config import DataConfig, round_up
from jaxpar.data.packing import Examples


class Pipeline:
    """Text to batches.

    Attributes:
      config: as given.
      tokenizer: the working tokenizer.
      vocabulary: the model's vocabulary: the tokenizer's, rounded up to a multiple.
      fingerprint: what `position` counts: contents, tokenizer, packing, order. JSON-able, compared on resuming.

    Raises:
      UserError: everything that can be wrong with text, tokenizer and cache, see their modules.
    """

    def __init__(self, config: DataConfig, say: Callable[[str], None] = print):
        self.config = config
        self.tokenizer = config.tokenizer.load()
        self.vocabulary = round_up(self.tokenizer.size, config.vocabulary_multiple)
        streams = _open_together(config, self.tokenizer, say)
        self._streams = streams
        pad = self.tokenizer.eod
        self.train = Examples(streams["train"], config.length, config.packing, pad, "the training split")
        self.held_out = Examples(streams["validation"], config.length, config.packing, pad, "the validation split")
        self.fingerprint = {
            # Of the tokens, not of files and their dates: a moved or copied corpus is the same.
            "contents": cache.digest([stream.digest for stream in streams.values()]),
            "length": config.length,
            "packing": config.packing,
            "shuffle": config.shuffle,
            "seed": config.seed if config.shuffle else None,
        }

    @cached_property
    def _order(self) -> Any:
        """Position -> example, endless: grain's index shuffle needs no memory, and gives any position at once."""
        import grain

        order = grain.MapDataset.range(len(self.train))
        if self.config.shuffle:
            # grain shuffles pass p with seed + p, so that neighbouring seeds would share all but one of their orders:
            # they are spread out first.
            spread = hashlib.blake2b(b"order %d" % self.config.seed, digest_size=4).digest()
            order = order.shuffle(seed=int.from_bytes(spread, "little"))
        return order.repeat()

    @cached_property
    def _held_out_order(self) -> np.ndarray:
        """One fixed order of the held-out examples, so that the first few batches are like all of them."""
        return np.random.default_rng(0).permutation(len(self.held_out))

    def examples(self, positions: np.ndarray) -> np.ndarray:
        """The indices of the training examples at these positions."""
        return np.array([self._order[int(p)] for p in positions], np.int64)

    def rows(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """The training examples at these global positions: fields of `jaxpar.step.Batch`, as NumPy."""
        positions = np.asarray(positions, np.int64)
        return {**self.train.rows(self.examples(positions)), "sample_ids": _sample_ids(positions)}

    def batch(self, position: int, rows: int, sharding: Any) -> Any:
        """The global batch of `rows` rows from `position` on, as a `jaxpar.step.Batch` of sharded arrays."""
        return _sharded(lambda at: self.rows(position + at), rows, self.config.length, sharding)

    def batches(self, position: int, rows: int, sharding: Any) -> Iterator[Any]:
        """Endless batches from `position` on, made ahead in the background."""
        import grain

        make = lambda b: self.batch(position + b * rows, rows, sharding)
        numbers = grain.MapDataset.range(2**40).map(make)
        ahead = self.config.prefetch
        options = grain.ReadOptions(num_threads=1 if ahead else 0, prefetch_buffer_size=ahead)
        return iter(numbers.to_iter_dataset(options))

    def validation(self, batches: int, rows: int, sharding: Any) -> Iterator[Any]:
        """The first `batches` held-out batches, in a fixed order; where there are fewer rows, the rest is padding."""
        for b in range(batches):
            if b * rows >= len(self.held_out):
                return
            yield _sharded(lambda at, b=b: self._held_out_rows(b * rows + at), rows, self.config.length, sharding)

    def _held_out_rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        there = indices < len(self.held_out)
        found = self.held_out.rows(self._held_out_order[np.where(there, indices, 0)])
        for name in ("weights", "segments"):
            found[name] = found[name] * there[:, None].astype(found[name].dtype)
        return {**found, "sample_ids": _sample_ids(indices)}

    def bigram_loss(self, batches: int, rows: int) -> float:
        """The held-out loss of a bigram model, in nats per token, on the very tokens that `validation` gives."""
        count = min(batches * rows, len(self.held_out))
        model = bigram.fit(self._streams["train"], self.tokenizer.size)
        return bigram.loss(model, self.held_out.rows(self._held_out_order[:count]))


def _sample_ids(positions: np.ndarray) -> np.ndarray:
    # Keys fold in 32 bits; after 2^31 examples ids come again, which no draw can notice.
    return (positions % 2**31).astype(np.int32)


def _open_together(config: DataConfig, tokenizer: Any, say: Callable[[str], None]):
    """The first process tokenises, the others wait and then open (or build their own, where the disk is not shared)."""
    import jax

    if jax.process_count() == 1:
        return cache.open_or_build(config, tokenizer, say)[0]
    from jax.experimental import multihost_utils

    quiet = lambda text: None
    first = jax.process_index() == 0
    problem, found = None, None
    if first:
        try:
            found = cache.open_or_build(config, tokenizer, say)[0]
        except Exception as error:
            problem = error
    # Every process must come here, or the others wait for ever.
    multihost_utils.sync_global_devices("jaxpar tokenised cache")
    if problem is not None:
        raise problem
    return found if first else cache.open_or_build(config, tokenizer, quiet)[0]


def _sharded(make: Callable[[np.ndarray], dict[str, np.ndarray]], rows: int, length: int, sharding: Any) -> Any:
    """A `Batch` whose rows are made where they are held: `make` gets row numbers of the global batch."""
    import jax

    from jaxpar.step import Batch

    made: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def part(name: str, index: tuple) -> np.ndarray:
        start, stop, _ = index[0].indices(rows)
        if (start, stop) not in made:
            made[start, stop] = make(np.arange(start, stop))
        found = made[start, stop][name]
        return found[(slice(None), *index[1:])]

    def array(name: str) -> jax.Array:
        shape = (rows,) if name == "sample_ids" else (rows, length)
        return jax.make_array_from_callback(shape, sharding, lambda index: part(name, index))

    return Batch(**{name: array(name) for name in Batch.__dataclass_fields__})
