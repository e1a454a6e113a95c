"""Which mesh axes a value may differ over: `shard_map(check_vma=True)` keeps it in types, and loops want it declared.

A loop's carry has one type for all turns. Where it starts from constants, which are the same everywhere, and ends with
something that differs between devices, the start must be cast. Outside of a `shard_map` all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax


def varies_over(x) -> frozenset[str]:
    """The mesh axes that x may differ over."""
    return varies_over_type(jax.typeof(x))


def varies_over_type(kind) -> frozenset[str]:
    """The same of a value's abstract type, as `jax.typeof` gives it and a jaxpr's variables have it."""
    manual = getattr(kind, "manual_axis_type", None)
    # Older and newer releases name it differently.
    return getattr(kind, "vma", frozenset()) if manual is None else manual.varying


def varying(x, axes: Iterable[str]):
    """x, cast to vary over these mesh axes too."""
    missing = tuple(sorted(frozenset(axes) - varies_over(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def alike(*arrays):
    """The arrays (or trees), each cast to vary over every mesh axis that any of them varies over."""
    axes = frozenset().union(*map(varies_over, jax.tree.leaves(arrays)))
    return jax.tree.map(lambda x: varying(x, axes), arrays)
