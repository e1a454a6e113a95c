"""Whole training steps of a Llama, timed beside each other: in turn, a step of each a round.

The machine's speed drifts, and moves all steps of a round together: what is quoted is the median over rounds of the ratio to
the first one's step of the same round, every other round in the other direction.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def made(cfg: Any, rows: int, transforms: Callable | tuple = (), replicas: int = 1):
    """(step, state, batch, the state's shapes and places) of random tokens, one document a row.

    Args:
      cfg: a `ModelConfig`; rows are as long as its context.
      transforms: around gradients clipped by their global norm; a function of the program where it needs that.
    """
    import jax
    import jax.numpy as jnp

    from jaxpar.optimisers import make
    from jaxpar.optimisers_config import AdamW, Constant
    from jaxpar.parallel.mesh import MeshConfig, make_mesh
    from jaxpar.program import build
    from jaxpar.state import abstract_state
    from jaxpar.step import Batch, chain
    from jaxpar.steps.base import make_step
    from jaxpar.steps.clip import clip_global

    program = build(cfg, make_mesh(MeshConfig(data=replicas), jax.devices()[:replicas]), rows=rows)
    around = transforms(program, (clip_global(1.0),)) if callable(transforms) else (clip_global(1.0), *transforms)
    tx = make(AdamW(schedule=Constant(1e-4)), program.specs, steps=10_000)
    step = chain(make_step(program.grad_fn, tx), *around)
    target = abstract_state(step, program, jax.random.key(1))
    places = jax.tree.map(lambda x: x.sharding, target)
    state = jax.jit(step.init, out_shardings=places)(program.init(jax.random.key(0)), jax.random.key(1))
    shape = (rows, cfg.context)
    tokens = jax.random.randint(jax.random.key(2), shape, 0, cfg.vocabulary)
    at, ones = jnp.broadcast_to(jnp.arange(cfg.context), shape), jnp.ones(shape, jnp.int32)
    batch = Batch(tokens, jnp.roll(tokens, -1, 1), jnp.ones(shape), at, ones, jnp.arange(rows))
    return step, state, jax.device_put(batch, program.batch_sharding), target


def stepping(cfg: Any, rows: int, transforms: Callable | tuple = ()) -> tuple[Callable[[], float], int]:
    """A function that runs one step, waits for it and returns the seconds that it took; and the compiled step's temporary
    bytes. The state is donated. Two steps have been run already."""
    import jax

    step, state, batch, _ = made(cfg, rows, transforms)
    update = jax.jit(step.update, donate_argnums=0).lower(state, batch).compile()
    box = [state]

    def run() -> float:
        start = time.perf_counter()
        box[0], metrics = update(box[0], batch)
        float(metrics["loss"])
        return time.perf_counter() - start

    run()
    run()
    return run, update.memory_analysis().temp_size_in_bytes


def rounds_of(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict]:
    """By name: the median ratio to the first step, the median of the seconds, and all of them; and the median ratio of the
    processor time that this process took, all its threads, which other work on the machine moves less than the clock."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    busy: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds):
        for name in list(steps) if i % 2 else list(reversed(steps)):
            start = time.process_time()
            seconds[name].append(steps[name]())
            busy[name].append(time.process_time() - start)

    def ratio(taken: dict[str, list[float]], name: str) -> float:
        first = next(iter(taken.values()))
        return statistics.median(a / b for a, b in zip(taken[name], first, strict=True))

    return {
        name: {
            "ratio": ratio(seconds, name),
            "processor_ratio": ratio(busy, name),
            "seconds": statistics.median(seconds[name]),
            "all": seconds[name],
        }
        for name in steps
    }
