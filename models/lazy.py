"""JAX imported at first use.

Strategies are their own configuration (frozen dataclasses with methods), and the command line is made from their
fields. `jaxpar --help` must answer in under a second, and importing JAX alone takes two: modules that hold strategies
therefore take `jax` and `jnp` from here, and only calling a method imports them.
"""

import importlib
from typing import TYPE_CHECKING, Any


class _Lazy:
    """Stands for a module until one of its attributes is read."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


if TYPE_CHECKING:
    import einops
    import jax
    import jax.numpy as jnp
else:
    jax = _Lazy("jax")
    jnp = _Lazy("jax.numpy")
    einops = _Lazy("einops")

__all__ = ["einops", "jax", "jnp"]
