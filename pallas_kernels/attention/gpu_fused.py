"""The backward pass of attention for Hopper GPUs as one kernel: dk and dv of a block of keys, and its part of every dq.

By keys, as `gpu_kernels.backward_k`, and what dq needs is there already: five products instead of the seven of two kernels
(FlashAttention-2, arXiv 2307.08691, algorithm 2; FlashAttention-3, arXiv 2407.08608, section 3). The parts of dq are added to
global memory by the copy engine, in float32 and in the order in which blocks come to it: the last bits of dq differ from run
to run.

The gradient of logits goes through shared memory, for dq sums over the keys of both warpgroups; each makes half of dq's
columns. A step multiplies those of the step before, so that no warpgroup waits for what the other one has only begun.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpar.pallas_kernels import gpu
from jaxpar.pallas_kernels.attention.gpu_kernels import (
    COMPUTE,
    ROWS,
    Settings,
    copy_rows,
    feed,
    labels,
    masked,
    place,
    query_copies,
    query_step,
    roles,
    slot_of,
    spread,
)
from jaxpar.pallas_kernels.gpu import ACROSS, LOG2

COLUMNS = ROWS
"""Queries of a step. The sums of dk and dv leave no registers for more."""


def backward_scratch(settings: Settings) -> dict:
    found = settings.scratch(
        ("k_tile", "v_tile", *settings.labels("rows")),
        (("q_tile", "lse_rows", "drop_rows", *settings.labels("columns")), ("d_out_tile",)),
    )
    return found | {
        "d_logits": plgpu.SMEM((2, COMPUTE, ROWS, COLUMNS), settings.dtype),
        "part": plgpu.SMEM((COMPUTE, COLUMNS, settings.size // COMPUTE), jnp.float32),
        "both": plgpu.Barrier(num_arrivals=COMPUTE),
    }


def backward(settings: Settings, names, *refs):
    """dk, dv and parts of dq of a block of keys, over the query heads that share it.

    `dq` is float32 [B, T, H, K], zeros before; with `settings.interpret` [blocks of keys, B, T, H, K], for the interpreter
    cannot add: XLA does.
    """
    x = place(settings, names, refs, backwards=False)
    wide = lambda numbers: spread(numbers, (ROWS, COLUMNS), 1)
    half = settings.size // COMPUTE
    mine = pl.ds(x.warpgroup * half, half)
    steps = settings.shared * x.steps

    def multiply_dq(dq, n):
        """Begin this warpgroup's columns of the part of dq that step n's gradient of logits gives."""
        for w in range(COMPUTE):
            dq.add(x.d_logits.at[lax.rem(n, 2), w].transpose((1, 0)), x.k_tile.at[w, :, mine])

    def send(n, part):
        """Add step n - 1's part to dq; before step 0 there is none."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tile = x.part.at[x.warpgroup]
        tile[...] = part
        plgpu.commit_smem()

        @pl.when(n > 0)
        def _():
            head, queries = query_step(x, settings, n - 1)
            if settings.interpret:
                plgpu.copy_smem_to_gmem(tile, x.dq.at[x.block, x.batch, queries, head, mine])
            else:
                plgpu.copy_smem_to_gmem(tile, x.dq.at[x.batch, queries, head, mine], reduction_op="add")

    def multiply_logits(logits, n, slot):
        plgpu.barrier_wait(x.ready_0.at[slot])
        logits.add(x.k_tile.at[x.warpgroup], x.q_tile.at[slot], transposed=True)

    def weights_of(logits, n, slot):
        """In the operands' dtype for dv, and in float32, with the cap's slope, for the gradient of logits."""
        logits = masked(settings, x, settings.scaled(logits), x.first + lax.rem(n, x.steps), slot, "k")
        weights = jnp.exp2(logits - wide(gpu.load(x.lse_rows.at[slot], ACROSS) / LOG2))
        return weights.astype(settings.dtype), settings.sloped(weights, logits)

    def multiply_weights(d_weights, slot):
        d_weights.add(x.v_tile.at[x.warpgroup], x.d_out_tile.at[slot], transposed=True)

    def write(n, slot, weights, d_weights):
        """The gradient of logits, to where both warpgroups find it, and here."""
        d_logits = weights * (d_weights - wide(gpu.load(x.drop_rows.at[slot], ACROSS)))
        d_logits = d_logits.astype(settings.dtype)
        x.d_logits.at[lax.rem(n, 2), x.warpgroup][...] = d_logits
        plgpu.commit_smem()
        return d_logits

    def in_turn(n, slot, logits, d_weights, dq, dk, dv):
        """A step whose products are waited for two by two: with head size 128 there are no registers for more."""
        plgpu.barrier_wait(x.both)
        multiply_logits(logits, n, slot)
        multiply_dq(dq, n + 1)
        scaled = logits.value()
        send(n, dq.value())
        halves, weights = weights_of(scaled, n, slot)
        plgpu.barrier_wait(x.ready_1.at[slot])
        multiply_weights(d_weights, slot)
        dv.add(halves, x.d_out_tile.at[slot])
        dv.value()
        plgpu.barrier_arrive(x.used_1.at[slot])
        d_logits = write(n, slot, weights, d_weights.value())
        plgpu.barrier_arrive(x.both)
        dk.add(d_logits, x.q_tile.at[slot])
        dk.value()
        plgpu.barrier_arrive(x.used_0.at[slot])

    def together(n, slot, logits, d_weights, dq, dk, dv):
        """A step in which exponentials are taken while one product is under way, and three follow at once."""
        multiply_logits(logits, n, slot)
        plgpu.barrier_wait(x.ready_1.at[slot])
        multiply_weights(d_weights, slot)
        halves, weights = weights_of(logits.value(after=1), n, slot)
        # The other warpgroup is done with what lies there, and has written its part of the step before.
        plgpu.barrier_wait(x.both)
        d_logits = write(n, slot, weights, d_weights.value())
        dv.add(halves, x.d_out_tile.at[slot])
        dk.add(d_logits, x.q_tile.at[slot])
        multiply_dq(dq, n + 1)
        dv.value(after=COMPUTE + 1)
        plgpu.barrier_arrive(x.used_1.at[slot])
        dk.value(after=COMPUTE)
        plgpu.barrier_arrive(x.used_0.at[slot])
        part = dq.value()
        plgpu.barrier_arrive(x.both)
        send(n, part)

    def step(n, totals):
        products = in_turn if settings.size > 64 else together
        slot = slot_of(settings, x, n)
        fresh = (ROWS, COLUMNS), (ROWS, COLUMNS), (COLUMNS, half)
        run = lambda *sums: products(n, slot, *sums)
        return gpu.in_flight(run, fresh, totals, interpret=settings.interpret)

    def compute():
        marks = labels(x, settings, "k_labels", "rows", x.mine)
        tiles = (x.k, x.k_tile), (x.v, x.v_tile)
        copy_rows(x, [*((source.at[x.batch, x.mine, x.head], to) for source, to in tiles), *marks])
        # What the first step waits for: the other warpgroup's keys.
        plgpu.barrier_arrive(x.both)
        zero = gpu.zeros((ROWS, settings.size))
        dk, dv = lax.fori_loop(0, steps, step, [zero, zero])
        plgpu.barrier_wait(x.both)

        def last(dq):
            multiply_dq(dq, steps + 1)
            send(steps, dq.value())

        gpu.in_flight(last, [(COLUMNS, half)], [], interpret=settings.interpret)
        # Both leave by the place of v: the other warpgroup may still read k.
        for name, total in (("dk", dk * settings.scale), ("dv", dv)):
            leave(name, total)

    def leave(name, total):
        out = getattr(x, name)
        if not settings.precise:
            tile = x.v_tile.at[x.warpgroup]
            tile[...] = total.astype(settings.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, out.at[x.batch, x.mine, x.head])
            plgpu.wait_smem_to_gmem(0)
            return
        for start in range(0, settings.size, half):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            x.part.at[x.warpgroup][...] = total[:, start : start + half]
            plgpu.commit_smem()
            to = out.at[x.batch, x.mine, x.head, pl.ds(start, half)]
            plgpu.copy_smem_to_gmem(x.part.at[x.warpgroup], to)
        plgpu.wait_smem_to_gmem(0)

    roles(x, compute, lambda: feed(x, settings, steps, lambda n: query_copies(x, settings, n, ("lse", "drop"))))
