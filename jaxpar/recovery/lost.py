"""What of a training state lives on which stage, and losing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxpar.models.lazy import jax, jnp
from jaxpar.models.spec import LAYERS, flatten, path_name

Tree = Any
FIRST = "embedding"
"""The group of parameters that lives with the first stage; all that is neither it nor in the stack lives with the last."""


def labels(tree: Tree, specs: Tree) -> Tree:
    """Where each leaf lives: "layers" (it has one entry for each layer), "first", "last", or "" (everywhere).

    Parameters, moments, averages and copies end in their parameter's path; counts and factored moments of the stack are
    known by standing under "stacked" (see `jaxpar.state.state_specs`). What is no parameter's (counts of what is outside
    the stack, steps, keys) is a few bytes that every stage has.

    Args:
      tree: a state or a part of one; only shapes are read.
      specs: every parameter's `ParamSpec`.
    """
    flat = flatten(specs)
    ends = flat | {name.removeprefix(f"{LAYERS}/"): s for name, s in flat.items() if s.stacked}
    outside = {name: "first" if name.split("/")[0] == FIRST else "last" for name, s in flat.items() if not s.stacked}
    count = layers_of(specs)

    def one(path, x) -> str:
        parts = path_name(path).split("/")
        for start in range(len(parts)):
            name = "/".join(parts[start:])
            if (match := ends.get(name)) is not None:
                if match.stacked:
                    return LAYERS if x.shape[:1] == (count,) else ""
                return outside[name]
        return LAYERS if "stacked" in parts and x.shape[:1] == (count,) else ""

    return jax.tree_util.tree_map_with_path(one, tree)


def layers_of(specs: Tree) -> int:
    """L, the layers of the stack."""
    return next(s.shape[0] for s in flatten(specs).values() if s.stacked)


def poison(x) -> Any:
    """What stands where something was lost: NaN, or the smallest whole number."""
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.asarray(jnp.nan, x.dtype)
    return jnp.asarray(True if x.dtype == bool else jnp.iinfo(x.dtype).min, x.dtype)


def by_layer(mask_L, x):
    """A mask of layers, as it is needed beside a leaf [L, ...]."""
    return mask_L.reshape(-1, *(1,) * (x.ndim - 1))


def destroy(tree: Tree, where: Tree, mask_L, first, last) -> Tree:
    """Overwrite what is lost.

    Args:
      where: from `labels`.
      mask_L: bool [L], the lost layers.
      first, last: bool scalars, whether what lives with the first and the last stage is lost.
    """

    def one(x, label):
        if label == LAYERS:
            return jnp.where(by_layer(mask_L, x), poison(x), x)
        lost = {"first": first, "last": last}.get(label, False)
        return x if lost is False else jnp.where(lost, poison(x), x)

    return jax.tree.map(one, tree, where)


def keep_only(tree: Tree, where: Tree, wanted: Callable[[str], bool]) -> Tree:
    """The same tree with None (no leaf) for all that is not wanted: what is left keeps its path, and so its sharding."""
    return jax.tree.map(lambda x, label: x if wanted(label) else None, tree, where)


def parts(state) -> dict[str, Tree]:
    """All of a state that stages hold: parameters, optimiser state and slots, by their names in the state."""
    return {"params": state.params, "opt_state": state.opt_state, "slots": state.slots}
