"""Parameters declared once: shape, dtype, logical axes, initialiser, and whether weight decay applies.

Everything that is known of a parameter before it exists stands in its `ParamSpec`. Initial values, abstract shapes,
shardings (`jaxpar.parallel.rules`), weight-decay masks (`jaxpar.optimisers`) and checkpoint layouts derive from it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxpar.models.lazy import jax, jnp

Tree = Any
LAYERS = "layers"
"""The logical axis of the stack of layers. Always a parameter's first dimension, where it has it."""


@dataclass(frozen=True)
class Normal:
    """Normal with mean 0 and standard deviation `std`."""

    std: float

    def __call__(self, key, shape, dtype):
        return (self.std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


@dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float

    def __call__(self, key, shape, dtype):
        return jnp.full(shape, self.value, dtype)


@dataclass(frozen=True)
class ParamSpec:
    """What is known of one parameter before it exists.

    Attributes:
      shape: sizes of the dimensions.
      axes: the logical axis of each dimension, or None for one that is never sharded. A stacked parameter has
        `"layers"` first.
      init: `(key, shape, dtype) -> array`, called for one layer at a time.
      dtype: the dtype of the stored (master) value.
      decay: whether weight decay applies. Off for norms, biases and gates.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Callable
    dtype: str = "float32"
    decay: bool = True

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(
                f"a ParamSpec needs one logical axis for each dimension: shape {self.shape} has {len(self.shape)}, "
                f"axes {self.axes} has {len(self.axes)}"
            )
        if LAYERS in self.axes[1:]:
            raise ValueError(f"the axis 'layers' must come first, but axes are {self.axes}")

    @property
    def stacked(self) -> bool:
        return bool(self.axes) and self.axes[0] == LAYERS

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def is_spec(x) -> bool:
    return isinstance(x, ParamSpec)


def stack(specs: Tree, layers: int) -> Tree:
    """The same parameters for each of `layers` layers, stacked on a new leading `layers` dimension."""
    return map_specs(lambda s: ParamSpec((layers, *s.shape), (LAYERS, *s.axes), s.init, s.dtype, s.decay), specs)


def map_specs(f: Callable[[ParamSpec], Any], specs: Tree) -> Tree:
    return jax.tree.map(f, specs, is_leaf=is_spec)


def path_name(path) -> str:
    """A tree path as `layers/attention/query/kernel`."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def flatten(specs: Tree) -> dict[str, ParamSpec]:
    """`{"layers/attention/query/kernel": ParamSpec}` in tree order."""
    leaves = jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)[0]
    return {path_name(path): s for path, s in leaves}


def abstract(specs: Tree) -> Tree:
    """`jax.ShapeDtypeStruct` for each parameter."""
    return map_specs(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype)), specs)


def init(specs: Tree, key) -> Tree:
    """Initial values, a pure function of `key`: jit it with `out_shardings` to make them where they belong.

    Each parameter's key folds in its path, and each layer's its index, so that a parameter does not depend on which
    others exist, on how many layers follow, or on the mesh.
    """

    def one(path, s: ParamSpec):
        k = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
        if not s.stacked:
            return s.init(k, s.shape, jnp.dtype(s.dtype))
        keys_L = jax.vmap(lambda i: jax.random.fold_in(k, i))(jnp.arange(s.shape[0]))
        return jax.vmap(lambda k: s.init(k, s.shape[1:], jnp.dtype(s.dtype)))(keys_L)

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=is_spec)


def count(specs: Tree) -> int:
    """The number of parameters."""
    return sum(s.size for s in flatten(specs).values())
