"""What the guards share: a whole state kept back by a flag, without control flow and without a host sync."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpar.step import Gradients, TrainState


def all_finite(tree) -> jax.Array:
    """Whether every number of a tree is finite; a bool scalar on the device."""
    checks = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack(checks)) if checks else jnp.asarray(True)


def finite_gradients(gradients: Gradients) -> jax.Array:
    return jnp.isfinite(gradients.loss_sum) & jnp.isfinite(gradients.weight_sum) & all_finite(gradients.grads)


def select(keep, new: TrainState, old: TrainState) -> TrainState:
    """`new` where `keep`, else `old`: parameters, optimiser state, step and slots alike.

    An element-wise choice, which fuses with the optimiser's own arithmetic: it costs no pass over memory, and a NaN in
    what is not chosen goes nowhere. Slots that only one of the two has cannot be: transforms never add slots in a step.
    """

    def choose(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                jnp.where(keep, jax.random.key_data(a), jax.random.key_data(b)), impl=jax.random.key_impl(a)
            )
        return jnp.where(keep, a, b)

    return jax.tree.map(choose, new, old)
