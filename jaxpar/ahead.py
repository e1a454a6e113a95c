"""A run's programs compiled from shapes alone: before there is a state, and beside whatever else a run prepares."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxpar.program import Program
from jaxpar.step import Batch, Step, TrainState


def abstract_batch(rows: int, length: int, sharding: Any) -> Batch:
    """`jax.ShapeDtypeStruct`s of a global batch of `rows` rows of `length` tokens."""
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    ints, floats = array((rows, length), jnp.int32), array((rows, length), jnp.float32)
    return Batch(
        tokens=ints, targets=ints, weights=floats, positions=ints, segments=ints, sample_ids=array((rows,), jnp.int32)
    )


def lower(step: Step, program: Program, state: TrainState, rows: int, length: int) -> jax.stages.Lowered:
    """`step.update` traced for these shapes. The state is donated: the new one lies where the old one did.

    Args:
      state: from `jaxpar.state.abstract_state`, or arrays.
    """
    places = jax.tree.map(lambda x: x.sharding, state)
    whole = NamedSharding(program.mesh, PartitionSpec())
    update = jax.jit(step.update, donate_argnums=0, out_shardings=(places, whole))
    return update.lower(state, abstract_batch(rows, length, program.batch_sharding))


def lower_init(step: Step, program: Program, state: TrainState, key) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """`program.init` and `step.init` traced: the parameters of a run that begins, and the state around them."""
    places = jax.tree.map(lambda x: x.sharding, state)
    rest = jax.jit(step.init, out_shardings=places)
    return program.init_fn.lower(key), rest.lower(state.params, key)


def compile_beside(lowered: jax.stages.Lowered) -> Callable:
    """Compile in a thread of its own, and return at once a function that waits for it where it is called too early.

    Only compiling is done there: tracing reads settings that belong to the thread which asks (matmul precision, checks
    for NaNs). What compiling raises, the first call raises.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="compile")
    compiled = pool.submit(lowered.compile)
    pool.shutdown(wait=False)
    return lambda *arguments: compiled.result()(*arguments)
