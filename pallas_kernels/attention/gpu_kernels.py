"""The bodies of the Hopper attention kernels: what the warpgroups of a block do.

A block has two warpgroups that compute, 64 rows each, and one that feeds them: it copies the tiles of the other side into
shared memory, a few steps ahead, as they are used up. By queries (forward, dq) rows are queries; by keys (dk with dv) they
are keys and logits are transposed, so that every sum over the other side is a product whose first operand is in registers.
Logits and log-sum-exp are in units of log 2 here, as the chip's exponential is.

Dao et al. 2023 and Shah et al. 2024 (FlashAttention-3), with its producer warpgroup and two that take turns at the matrix
unit, as JAX's own `pallas.ops.gpu.attention_mgpu` (Apache 2.0) writes it for Mosaic GPU without documents, windows, cap and
a causal backward pass; softmax and products of one warpgroup do not overlap here.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpar.pallas_kernels import gpu
from jaxpar.pallas_kernels.attention.labels import Kinds
from jaxpar.pallas_kernels.gpu import ACROSS, ALONG, LOG2

COMPUTE = 2
"""Warpgroups that compute; the next one feeds them."""
ROWS = gpu.ROWS
REGISTERS, FEEDER_REGISTERS = 240, 24
"""Of a thread that computes, and of one that feeds: 64512 in a block, and a multiprocessor has 65536."""


@dataclass(frozen=True)
class Settings:
    """What a kernel knows before it is traced.

    Attributes:
      kinds: what the mask compares.
      shared: query heads that share a key/value head.
      one_row: all batch rows have the same labels and spans, which are there once.
      columns: how many tokens of the other side a step takes.
      stages: how many steps the feeder may be ahead.
      size: head size of the tiles, 64, 128 or 256.
      dtype: of the operands.
      interpret: whether the kernel will run in the interpreter.
      outs: what it computes, by which `backward_k` knows whether it is to sum dk, dv or both.
      precise: each sum leaves as two numbers of the operands' dtype, rounded and what rounding left (`leave`).
    """

    kinds: Kinds
    scale: float
    cap: float | None
    shared: int
    one_row: bool
    columns: int
    stages: int
    size: int
    dtype: Any
    interpret: bool = False
    outs: tuple[str, ...] = ()
    precise: bool = False

    def mma(self, total, a, b, **more):
        return gpu.mma(total, a, b, interpret=self.interpret, **more)

    def logits(self, a, b, **more):
        """`a bᵀ` scaled and capped, in units of log 2."""
        return self.scaled(self.mma((ROWS, self.columns), a, b, transposed=True, **more))

    def scaled(self, logits):
        """Products of queries and keys scaled and capped, in units of log 2."""
        return gpu.scaled(logits, self.scale, self.cap)

    def sloped(self, weights, logits):
        """Weights times the cap's slope, which is 0 where the mask has hidden a logit. From the capped logits: what is kept
        beside the sums must fit the registers."""
        if self.cap is None:
            return weights
        bent = jnp.maximum(logits * (LOG2 / self.cap), -1.0)
        return weights * (1 - bent * bent)

    def labels(self, of: str) -> tuple[str, ...]:
        """The label scratches of a side, "rows" or "columns"."""
        return tuple(f"{of}_{n}" for n in range(len(self.kinds.names)))

    def scratch(self, rows: tuple[str, ...], fed: tuple[tuple[str, ...], ...], outs: tuple[str, ...] = ()) -> dict:
        """Shared memory and barriers of a kernel by name.

        Args:
          rows: tiles that stay. Names of tiles are in `TILES`, others are numbers of tokens.
          fed: tiles that come step by step, in groups that come together.
          outs: what leaves without a place of its own.
        """
        found = {}
        for name in (*rows, *outs):
            found[name] = self._memory(name, COMPUTE, ROWS)
        for n, group in enumerate(fed):
            for name in group:
                found[name] = self._memory(name, self.stages, self.columns)
            found[f"ready_{n}"] = plgpu.Barrier(num_arrivals=len(group), num_barriers=self.stages)
            found[f"used_{n}"] = plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=self.stages)
        found["rows_ready"] = plgpu.Barrier(num_arrivals=len(rows), num_barriers=COMPUTE)
        return found

    def _memory(self, name: str, copies: int, tokens: int):
        if name in TILES:
            return plgpu.SMEM((copies, tokens, self.size), self.dtype)
        return plgpu.SMEM((copies, tokens), jnp.int32 if name[-1].isdigit() else jnp.float32)


TILES = ("q_tile", "k_tile", "v_tile", "d_out_tile")
REST = "_rest"
"""The output of what rounding left of another one has its name with this."""


def place(settings: Settings, names, refs, backwards: bool) -> SimpleNamespace:
    """References by name; where this warpgroup is; which steps its block needs, and of which it sees all.

    Args:
      backwards: the last block comes first. Under a causal mask those that have most to do should.
    """
    x = SimpleNamespace(**dict(zip(names, refs, strict=True)))
    x.batch, x.head, x.block, x.warpgroup = (lax.axis_index(n) for n in ("batch", "head", "block", "warpgroup"))
    if backwards:
        x.block = x.spans.shape[1] - 1 - x.block
    x.row = 0 if settings.one_row else x.batch
    x.first, last, *x.clear = (x.spans[x.row, x.block, n] for n in range(x.spans.shape[2]))
    x.steps = last - x.first + 1
    x.mine = pl.ds(x.block * (COMPUTE * ROWS) + x.warpgroup * ROWS, ROWS)
    return x


def roles(x, compute, feed) -> None:
    """Which warpgroups do what."""
    gpu.roles(x.warpgroup, COMPUTE, compute, feed, (REGISTERS, FEEDER_REGISTERS))


def spread(x, shape: tuple[int, int], axis: int):
    """Numbers of rows (axis 0) or of columns (axis 1) over a whole product."""
    return lax.broadcast_in_dim(x, shape, [axis])


def slot_of(settings: Settings, x, n):
    """Where the tiles of step `n` are. With one stage that is always 0, which the compiler must not find out: it would keep the
    address of every product in registers that the sums need."""
    return lax.rem(n, settings.stages) if settings.stages > 1 else lax.div(n, settings.shared * x.steps)


def masked(settings: Settings, x, logits, j, slot, rows_are: str):
    """Logits with -inf where nothing is seen; untouched where all of block `j` is seen by all of this block."""
    if not settings.kinds.names:
        return logits
    first, last = x.clear
    seen = (first <= j) & (j <= last)
    return lax.cond(seen, lambda logits: logits, lambda logits: hide(settings, x, logits, slot, rows_are), logits)


def hide(settings: Settings, x, logits, slot, rows_are: str):
    """Logits with -inf where nothing is seen, by the labels of this block and of a step's place."""
    shape = logits.shape
    of = {"rows": {}, "columns": {}}
    for name, row, column in zip(
        settings.kinds.names, settings.labels("rows"), settings.labels("columns"), strict=True
    ):
        of["rows"][name] = spread(gpu.load(getattr(x, row).at[x.warpgroup], ALONG), shape, 0)
        of["columns"][name] = spread(gpu.load(getattr(x, column).at[slot], ACROSS), shape, 1)
    # What comes next is copied to where these were read: reads come before it by a fence only.
    plgpu.commit_smem()
    q, k = (of["rows"], of["columns"]) if rows_are == "q" else (of["columns"], of["rows"])
    return jnp.where(settings.kinds.seen(q, k, x.window[0]), logits, -jnp.inf)


def copy_rows(x, copies) -> None:
    """Copy what stays, pairs of global memory and a scratch, and wait for it."""
    for source, to in copies:
        plgpu.copy_gmem_to_smem(source, to.at[x.warpgroup], x.rows_ready.at[x.warpgroup])
    plgpu.barrier_wait(x.rows_ready.at[x.warpgroup])


def labels(x, settings: Settings, source: str, of: str, tokens):
    """The copies of these tokens' labels."""
    return [(getattr(x, source).at[x.row, n, tokens], getattr(x, to)) for n, to in enumerate(settings.labels(of))]


def key_copies(x, settings: Settings):
    """By queries: the copies of a step, first what logits need."""

    def copies(n):
        keys, head = pl.ds((x.first + n) * settings.columns, settings.columns), lax.div(x.head, settings.shared)
        k, v = (source.at[x.batch, keys, head] for source in (x.k, x.v))
        return [(k, x.k_tile), *labels(x, settings, "k_labels", "columns", keys)], [(v, x.v_tile)]

    return copies


def query_step(x, settings: Settings, n):
    """By keys: the query head and the queries of a step."""
    head = x.head * settings.shared + lax.div(n, x.steps)
    return head, pl.ds((x.first + lax.rem(n, x.steps)) * settings.columns, settings.columns)


def query_copies(x, settings: Settings, n, numbers: tuple[str, ...]):
    """By keys: the copies of a step, first what logits need, with these numbers of its queries."""
    head, queries = query_step(x, settings, n)
    rows = [(getattr(x, name).at[x.batch, head, queries], getattr(x, f"{name}_rows")) for name in numbers]
    marks = labels(x, settings, "q_labels", "columns", queries)
    q, d_out = (source.at[x.batch, queries, head] for source in (x.q, x.d_out))
    return [(q, x.q_tile), *rows, *marks], [(d_out, x.d_out_tile)]


def feed(x, settings: Settings, steps, groups) -> None:
    """Copy the tiles of each step, as soon as their place is free. `groups(step)`: for each group, its copies."""

    @pl.loop(0, steps)
    def _(step):
        slot = lax.rem(step, settings.stages)
        for n, copies in enumerate(groups(step)):

            @pl.when(step >= settings.stages)
            def _(n=n):
                plgpu.barrier_wait(getattr(x, f"used_{n}").at[slot])

            for source, to in copies:
                plgpu.copy_gmem_to_smem(source, to.at[slot], getattr(x, f"ready_{n}").at[slot])


def forward_scratch(settings: Settings) -> dict:
    found = settings.scratch(
        ("q_tile", *settings.labels("rows")), (("k_tile", *settings.labels("columns")), ("v_tile",)), ("lse_rows",)
    )
    return found | {"turn": plgpu.Barrier(num_arrivals=COMPUTE)}


def forward(settings: Settings, names, *refs):
    """out and lse of a block of queries: softmax as it comes, rescaled where the largest logit grows."""
    x = place(settings, names, refs, backwards=True)
    wide = lambda numbers, size: spread(numbers, (ROWS, size), 0)

    def take_turns():
        plgpu.barrier_arrive(x.turn)
        plgpu.barrier_wait(x.turn)

    def step(n, carry):
        sums, top, total = carry
        slot = slot_of(settings, x, n)
        plgpu.barrier_wait(x.ready_0.at[slot])
        logits = settings.logits(x.q_tile.at[x.warpgroup], x.k_tile.at[slot], meanwhile=take_turns)
        logits = masked(settings, x, logits, x.first + n, slot, "q")
        plgpu.barrier_arrive(x.used_0.at[slot])
        before, top = top, jnp.maximum(top, jnp.max(logits, axis=1))
        # A row that has seen nothing yet has top = -inf; -inf - -inf would be NaN.
        level = jnp.where(top == -jnp.inf, 0.0, top)
        weights = jnp.exp2(logits - wide(level, settings.columns))
        shrink = jnp.exp2(before - level)
        total = total * shrink + jnp.sum(weights, axis=1)
        sums = sums * wide(shrink, settings.size)
        plgpu.barrier_wait(x.ready_1.at[slot])
        take_turns()
        sums = settings.mma(sums, weights.astype(settings.dtype), x.v_tile.at[slot])
        plgpu.barrier_arrive(x.used_1.at[slot])
        return sums, top, total

    def compute():
        marks = labels(x, settings, "q_labels", "rows", x.mine)
        copy_rows(x, [(x.q.at[x.batch, x.mine, x.head], x.q_tile), *marks])
        # The second warpgroup is half a step behind: one multiplies while the other takes exponentials.
        pl.when(x.warpgroup == 1)(take_turns)
        start = gpu.zeros((ROWS, settings.size)), gpu.zeros((ROWS,), ALONG) - jnp.inf, gpu.zeros((ROWS,), ALONG)
        sums, top, total = lax.fori_loop(0, x.steps, step, start)
        pl.when(x.warpgroup == 0)(take_turns)
        empty = total == 0.0
        share = jnp.where(empty, 1.0, total)
        x.q_tile.at[x.warpgroup][...] = (sums / wide(share, settings.size)).astype(settings.dtype)
        x.lse_rows.at[x.warpgroup][...] = jnp.where(empty, -jnp.inf, jnp.log(share) + top * LOG2)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x.q_tile.at[x.warpgroup], x.out.at[x.batch, x.mine, x.head])
        plgpu.copy_smem_to_gmem(x.lse_rows.at[x.warpgroup], x.lse.at[x.batch, x.head, x.mine])
        plgpu.wait_smem_to_gmem(0)

    roles(x, compute, lambda: feed(x, settings, x.steps, key_copies(x, settings)))


def leave(x, settings: Settings, sums) -> None:
    """Copy sums out: `(name, sum, tile)`, each by the place of a tile that is not needed any more.

    Float32 sums of whole blocks would need twice that place, which shared memory does not have.
    """
    for suffix in ("", REST) if settings.precise else ("",):
        if suffix:
            rest = lambda total: total - total.astype(settings.dtype).astype(jnp.float32)
            sums = [(name, rest(total), tile) for name, total, tile in sums]
        for _, total, tile in sums:
            tile.at[x.warpgroup][...] = total.astype(settings.dtype)
        plgpu.commit_smem()
        for name, _, tile in sums:
            plgpu.copy_smem_to_gmem(tile.at[x.warpgroup], getattr(x, name + suffix).at[x.batch, x.mine, x.head])
        plgpu.wait_smem_to_gmem(0)


def backward_q_scratch(settings: Settings) -> dict:
    return settings.scratch(
        ("q_tile", "d_out_tile", "lse_rows", "drop_rows", *settings.labels("rows")),
        (("k_tile", *settings.labels("columns")), ("v_tile",)),
    )


def backward_q(settings: Settings, names, *refs):
    """dq of a block of queries."""
    x = place(settings, names, refs, backwards=True)
    wide = lambda numbers: spread(numbers, (ROWS, settings.columns), 0)

    def compute():
        marks = labels(x, settings, "q_labels", "rows", x.mine)
        copy_rows(
            x,
            [
                (x.q.at[x.batch, x.mine, x.head], x.q_tile),
                (x.d_out.at[x.batch, x.mine, x.head], x.d_out_tile),
                (x.lse.at[x.batch, x.head, x.mine], x.lse_rows),
                (x.drop.at[x.batch, x.head, x.mine], x.drop_rows),
                *marks,
            ],
        )
        lse = gpu.load(x.lse_rows.at[x.warpgroup], ALONG) / LOG2
        drop = gpu.load(x.drop_rows.at[x.warpgroup], ALONG)

        def step(n, carry):
            sums, lse, drop = carry
            slot = slot_of(settings, x, n)
            plgpu.barrier_wait(x.ready_0.at[slot])
            logits = settings.logits(x.q_tile.at[x.warpgroup], x.k_tile.at[slot])
            logits = masked(settings, x, logits, x.first + n, slot, "q")
            weights = settings.sloped(jnp.exp2(logits - wide(lse)), logits)
            plgpu.barrier_wait(x.ready_1.at[slot])
            d_weights = settings.mma(
                (ROWS, settings.columns), x.d_out_tile.at[x.warpgroup], x.v_tile.at[slot], transposed=True
            )
            plgpu.barrier_arrive(x.used_1.at[slot])
            d_logits = weights * (d_weights - wide(drop))
            sums = settings.mma(sums, d_logits.astype(settings.dtype), x.k_tile.at[slot])
            plgpu.barrier_arrive(x.used_0.at[slot])
            return sums, lse, drop

        sums, _, _ = lax.fori_loop(0, x.steps, step, (gpu.zeros((ROWS, settings.size)), lse, drop))
        leave(x, settings, [("dq", sums * settings.scale, x.q_tile)])

    roles(x, compute, lambda: feed(x, settings, x.steps, key_copies(x, settings)))


def backward_k_scratch(settings: Settings) -> dict:
    more = ("v_tile",) if "dk" in settings.outs else ()
    numbers = ("lse_rows", "drop_rows") if "dk" in settings.outs else ("lse_rows",)
    return settings.scratch(
        ("k_tile", *more, *settings.labels("rows")),
        (("q_tile", *numbers, *settings.labels("columns")), ("d_out_tile",)),
    )


def backward_k(settings: Settings, names, *refs):
    """dk, dv or both of a block of keys, summed over the query heads that share it."""
    x = place(settings, names, refs, backwards=False)
    wide = lambda numbers: spread(numbers, (ROWS, settings.columns), 1)

    def step(n, sums):
        sums = dict(zip(settings.outs, sums, strict=True))
        slot = slot_of(settings, x, n)
        plgpu.barrier_wait(x.ready_0.at[slot])
        logits = settings.logits(x.k_tile.at[x.warpgroup], x.q_tile.at[slot])
        logits = masked(settings, x, logits, x.first + lax.rem(n, x.steps), slot, "k")
        weights = jnp.exp2(logits - wide(gpu.load(x.lse_rows.at[slot], ACROSS) / LOG2))
        halves = weights.astype(settings.dtype)
        weights = settings.sloped(weights, logits)
        plgpu.barrier_wait(x.ready_1.at[slot])
        if "dv" in sums:
            sums["dv"] = settings.mma(sums["dv"], halves, x.d_out_tile.at[slot])
        if "dk" in sums:
            d_weights = settings.mma(
                (ROWS, settings.columns), x.v_tile.at[x.warpgroup], x.d_out_tile.at[slot], transposed=True
            )
        plgpu.barrier_arrive(x.used_1.at[slot])
        if "dk" in sums:
            d_logits = weights * (d_weights - wide(gpu.load(x.drop_rows.at[slot], ACROSS)))
            sums["dk"] = settings.mma(sums["dk"], d_logits.astype(settings.dtype), x.q_tile.at[slot])
        # As in `masked`: lse and drop were read.
        plgpu.commit_smem()
        plgpu.barrier_arrive(x.used_0.at[slot])
        return tuple(sums.values())

    def compute():
        marks = labels(x, settings, "k_labels", "rows", x.mine)
        tiles = [(x.k, x.k_tile), (x.v, x.v_tile)] if "dk" in settings.outs else [(x.k, x.k_tile)]
        copy_rows(x, [*((source.at[x.batch, x.mine, x.head], to) for source, to in tiles), *marks])
        start = tuple(gpu.zeros((ROWS, settings.size)) for _ in settings.outs)
        sums = dict(zip(settings.outs, lax.fori_loop(0, settings.shared * x.steps, step, start), strict=True))
        if "dk" in sums:
            sums["dk"] = sums["dk"] * settings.scale
        leave(x, settings, [(name, total, tile) for (name, total), (_, tile) in zip(sums.items(), tiles, strict=False)])

    numbers = ("lse", "drop") if "dk" in settings.outs else ("lse",)
    copies = lambda n: query_copies(x, settings, n, numbers)
    roles(x, compute, lambda: feed(x, settings, settings.shared * x.steps, copies))
