"""What a model asks of the place of a row's tokens (`jaxpar.models.rows.Rows`), answered inside a `shard_map` over the axes that
they lie on."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from jaxpar.parallel.sequence.layouts import Layout


@dataclass(frozen=True)
class SpreadRows:
    """Methods as those of `Rows`.

    Attributes:
      layout: one of `layouts.LAYOUTS`.
      axes: names of the axes that tokens lie on, of which the first decides the layout.
    """

    layout: str
    axes: tuple[str, ...]

    @property
    def spread(self) -> bool:
        return True

    def runs(self, tokens: int, shards: int):
        whole = Layout(self.layout, jax.lax.axis_size(self.axes[0]), tokens * jax.lax.axis_size(self.axes))
        return whole.runs(tokens // shards)

    def gather(self, x):
        return jax.lax.all_gather(x, self.axes, axis=1, tiled=True)

    def total(self, x):
        return jax.lax.psum(x, self.axes)
