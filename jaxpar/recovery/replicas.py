"""Copies of parts of a state that strategies keep: made, destroyed with their holders, and put back."""

from __future__ import annotations

from typing import Any

from jaxpar.errors import UserError
from jaxpar.models.lazy import jax, jnp
from jaxpar.models.spec import LAYERS
from jaxpar.recovery import lost
from jaxpar.recovery.base import Stages, copied

Tree = Any


def ends(state, stages: Stages) -> Tree:
    """A copy of embedding, final norm and output projection, with their moments and averages."""
    return copied(_only(state, stages, ("first", "last")))


def everything(state, stages: Stages) -> Tree:
    """A copy of all that lives on stages; a stage's layers lie where the stage before it is, which holds them."""
    copy = _only(state, stages, (LAYERS, "first", "last"))
    where = lost.labels(copy, stages.specs)
    return jax.tree.map(
        lambda x, label: jnp.roll(x, -stages.each, axis=0) if label == LAYERS else jnp.copy(x), copy, where
    )


def damaged(copy: Tree, first, last, stages: Stages, failed_S=None) -> Tree:
    """What is left of a copy.

    Args:
      first, last: bool scalars, whether the holders of the first and the last stage's ends are lost.
      failed_S: bool [S], the lost holders of layers. None: the copy has none.
    """
    mask_L = jnp.zeros(stages.layers, bool) if failed_S is None else stages.spread(failed_S)
    return lost.destroy(copy, lost.labels(copy, stages.specs), mask_L, first, last)


def put_back(state, copy: Tree, back_S, stages: Stages):
    """The state with a copy's parts in the stages of the mask, ends with the first and the last one."""
    tree = lost.parts(state)
    if jax.tree.structure(_only(state, stages, _labels_of(copy, stages))) != jax.tree.structure(copy):
        raise UserError(
            "a strategy that keeps copies must see every slot: put recovering behind (outside) ema in the chain"
        )
    where = lost.labels(tree, stages.specs)
    back_L = stages.spread(back_S)
    others = {name: jax.tree.map(lambda _: None, slot) for name, slot in tree["slots"].items()}
    copy = {**copy, "slots": others | copy["slots"]}

    def one(x, label, kept):
        if kept is None:
            return x
        if label == LAYERS:
            return jnp.where(lost.by_layer(back_L, x), jnp.roll(kept, stages.each, axis=0), x)
        return jnp.where(back_S[0] if label == "first" else back_S[-1], kept, x)

    return state.replace(**jax.tree.map(one, tree, where, copy))


def end_bytes(state, label: str, stages: Stages) -> int:
    """Bytes of what lives with the "first" or the "last" stage."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(_only(state, stages, (label,))))


def _labels_of(copy: Tree, stages: Stages) -> tuple[str, ...]:
    return tuple(set(jax.tree.leaves(lost.labels(copy, stages.specs))))


def _only(state, stages: Stages, wanted: tuple[str, ...]) -> Tree:
    tree = lost.parts(state)
    kept = lost.keep_only(tree, lost.labels(tree, stages.specs), lambda label: label in wanted)
    # A slot of which nothing is kept leaves no trace: a guard around this transform may have added it since.
    return {**kept, "slots": {name: slot for name, slot in kept["slots"].items() if jax.tree.leaves(slot)}}
