"""What kernels for Pallas' Mosaic GPU backend share: how they are called on each release of JAX, and products of tiles.

Mosaic GPU's interface changes between releases: whatever differs between 0.10.2 and 0.12 is in here. Kernels are called by
`plgpu.kernel` only (a bare `pallas_call` is another backend since 0.11), and say how they are lowered (the default changed).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from inspect import Parameter, signature

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpar.pallas_kernels.varying import varies_over, varying

ROWS = 64
"""Rows of the first operand that one warpgroup multiplies (wgmma's M)."""
MAY_INTERPRET = hasattr(plgpu, "InterpretGPUParams")
"""Whether this JAX has a whole interpreter of Mosaic GPU kernels: since 0.11."""
ALONG, ACROSS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
"""How numbers of rows, and of columns, lie over the threads that hold a product."""
LOG2 = math.log(2)
"""Logits in units of this are what the chip's own exponential, exp2, takes."""


def interpreter(interpret):
    """What `interpret` of a kernel means: False, or the interpreter's parameters (True: its defaults).

    Raises:
      ValueError: JAX is older than 0.11.
    """
    if not interpret:
        return False
    if not MAY_INTERPRET:
        raise ValueError(f"Mosaic GPU kernels can be interpreted from JAX 0.11 on, and this is JAX {jax.__version__}")
    return plgpu.InterpretGPUParams() if interpret is True else interpret


def reset_interpreter() -> None:
    """Forget what the interpreter was doing when it raised an error; it would wait for it for ever."""
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state

    reset_gpu_interpret_mode_state()


def kernel(
    body: Callable,
    outs,
    *,
    grid: dict[str, int],
    warpgroups: int,
    cluster: dict[str, int] | None = None,
    scratch=(),
    approximate=True,
    interpret=False,
    name=None,
):
    """A kernel as a function of its arrays: `body(*inputs, *outputs, *scratch)` on references in global memory.

    Args:
      outs: `jax.ShapeDtypeStruct`s of the outputs, a list.
      grid: how many blocks along each named axis; `jax.lax.axis_index` gives a block's place, and along "warpgroup" the
        warpgroup's.
      warpgroups: in each block.
      cluster: how many blocks along each named axis of a cluster; each place of the grid is one. In the interpreter, which has
        no copies to several blocks, each copies all of it for itself.
      scratch: `plgpu.SMEM`, `plgpu.Barrier`; shared by the warpgroups of a block.
      approximate: take the chip's fast exp2, log2 and reciprocal.

    Raises:
      ValueError: more warpgroups than the interpreter has threads for.
    """
    if interpret:
        _check_threads(warpgroups, name)
    more = {"kernel_name": name} if name else {}
    run = plgpu.kernel(
        body,
        out_type=list(outs),
        scratch_types=list(scratch),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        cluster=tuple((cluster or {}).values()),
        cluster_names=tuple(cluster or {}),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=approximate, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        # None asks JAX's configuration, which other kernels' interpreters share.
        interpret=interpreter(interpret) or None,
        **more,
    )

    def call(*arrays):
        # Mosaic GPU's outputs do not say that they differ over a mesh axis that an input differs over.
        axes = frozenset().union(*map(varies_over, arrays))
        return [varying(out, axes) for out in run(*arrays)]

    return call


def _check_threads(warpgroups: int, name: str | None) -> None:
    """Each warpgroup is a thread of XLA's for CPUs, which multiplies and gathers on the same ones: where all of them wait at
    barriers for one that computes, none ever does. Two threads have been enough for three warpgroups, and not for four."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(cores, len(jax.local_devices(backend="cpu")), 3)
    if warpgroups > threads:
        raise ValueError(
            f"{name or 'a kernel'} has {warpgroups} warpgroups in the interpreter, each on a thread of XLA's, which has "
            f"room for {threads} here: it would wait for ever. Start Python with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={warpgroups}"
        )


MAY_ADD = MAY_INTERPRET
"""Whether a kernel may be given references to arrays that it changes: since 0.11."""


def adding(call: Callable, shapes) -> Callable:
    """A kernel that also adds to float32 arrays, which come behind its inputs and are zeros before, as a function of its
    inputs: its outputs, and what the arrays have become. Under `vmap` one call follows the other.

    Args:
      call: takes arrays, and references to those that it adds to.
    """
    shapes = tuple(shapes)
    if not shapes:
        return call

    @jax.custom_batching.sequential_vmap
    def run(*arrays):
        axes = frozenset().union(*map(varies_over, arrays))
        # Kernels take no references to what differs over a mesh axis. What is read from them is said to differ.
        refs = [jax.new_ref(jnp.zeros(shape, jnp.float32)) for shape in shapes]
        # XLA would fuse slices before and behind it into the call, as those of a loop over layers, and forget that the arrays
        # which are added to are the ones that were zeros.
        outs = call(*jax.lax.optimization_barrier(arrays), *refs)
        return jax.lax.optimization_barrier([*outs, *(varying(ref[...], axes) for ref in refs)])

    return run


def same_bits() -> bool:
    """Whether XLA was told to give the same results on every run, by the flags that it has for it."""
    flags = os.environ.get("XLA_FLAGS", "")
    return any(
        re.search(rf"--{name}(=true|=1)?(\s|$)", flags)
        for name in ("xla_gpu_deterministic_ops", "xla_gpu_exclude_nondeterministic_ops")
    )


_WANTS_INDEX = getattr(signature(plgpu.load).parameters.get("idx"), "default", None) is Parameter.empty
"""Until 0.10; in 0.11 it may be given and is deprecated."""


def load(ref, layout=None):
    """All of a reference as an array with this layout over the threads."""
    return plgpu.load(ref, (), layout=layout) if _WANTS_INDEX else plgpu.load(ref, layout=layout)


def zeros(shape: tuple[int, ...], layout=None):
    """Float32 zeros with a layout over the threads; None: a product's sum."""
    layout = plgpu.Layout.WGMMA if layout is None else layout
    return plgpu.layout_cast(jnp.full(shape, 0, jnp.float32), layout)


def mma(total, a, b, *, transposed=False, interpret=False, meanwhile: Callable | None = None):
    """`total + a b` by the warpgroup's matrix instruction (wgmma), waited for.

    Args:
      total: float32 (int32 for int8) [M, N] in registers, M a multiple of 64, or its shape: then nothing is added to.
      a: [M, K], a reference to shared memory, or an array in registers.
      b: [K, N], a reference to shared memory; `transposed`: [N, K].
      interpret: the interpreter has no such instruction with an operand or a sum in registers: a dot of the same tiles
        instead.
      meanwhile: called when the product is under way.
    """
    meanwhile = meanwhile or (lambda: None)
    if interpret and (isinstance(a, jax.Array) or not isinstance(total, tuple)):
        meanwhile()
        left = a if isinstance(a, jax.Array) else a[...]
        kind = jnp.int32 if jnp.issubdtype(left.dtype, jnp.integer) else jnp.float32
        product = jax.lax.dot_general(
            left, b[...], (((1,), (1 if transposed else 0,)), ((), ())), preferred_element_type=kind
        )
        # The tiles were read as no instruction of the matrix unit reads them; a copy may follow.
        plgpu.commit_smem()
        return product if isinstance(total, tuple) else total + product
    b = b.transpose((1, 0)) if transposed else b

    def multiply(sum_ref):
        plgpu.wgmma(sum_ref, a, b)
        meanwhile()

    if not isinstance(total, tuple):
        return pl.run_state(multiply)(plgpu.ACC.init(total))

    def fresh(sum_ref):
        multiply(sum_ref)
        return sum_ref[...]

    kind = jnp.int32 if jnp.issubdtype(a.dtype, jnp.integer) else jnp.float32
    return pl.run_scoped(fresh, plgpu.ACC(total, kind))


def roles(warpgroup, workers: int, work: Callable, feed: Callable, registers: tuple[int, int]) -> None:
    """What a block's warpgroups do: the first `workers` work, the next one feeds them.

    Args:
      registers: of a thread that works, and of one that feeds.
    """

    @pl.when(warpgroup < workers)
    def _():
        plgpu.set_max_registers(registers[0], action="increase")
        work()

    @pl.when(warpgroup == workers)
    def _():
        plgpu.set_max_registers(registers[1], action="decrease")
        feed()


def scaled(logits, scale: float, cap: float | None):
    """Products of queries and keys as logits, scaled and capped, in units of `LOG2`."""
    if cap is None:
        return logits * (scale / LOG2)
    # tanh x = 1 - 2 / (e^2x + 1), of which an exponential is the chip's own.
    bent = 1 - 2 / (jnp.exp2(logits * (2 * scale / cap / LOG2)) + 1)
    return bent * (cap / LOG2)


class Sum:
    """A sum of products in registers, which the matrix unit may still be at. See `in_flight`."""

    def __init__(self, ref=None, value=None, shape=None):
        self._ref, self._value, self._shape = ref, value, shape

    def add(self, a, b, *, transposed=False) -> None:
        """Begin to add `a b` (`transposed`: `a bᵀ`). `a` is a reference to shared memory or an array in registers."""
        if self._ref is not None:
            plgpu.wgmma(self._ref, a, b.transpose((1, 0)) if transposed else b)
        else:
            self._value = mma(
                self._shape if self._value is None else self._value, a, b, transposed=transposed, interpret=True
            )

    def value(self, after: int = 0):
        """The sum, when all products but the last `after` that were begun are done."""
        if self._ref is not None:
            return plgpu.wgmma_accumulator_load(self._ref, wait_n=after)
        return self._value


def from_nothing(body: Callable, shapes, *, interpret=False):
    """`body(*sums)` with a `Sum` for each shape, from nothing; as `in_flight`."""
    if interpret:
        return body(*(Sum(shape=shape) for shape in shapes))
    return pl.run_scoped(lambda *refs: body(*map(Sum, refs)), *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def in_flight(body: Callable, fresh, carried, *, interpret=False) -> list:
    """Run `body(*sums)` with a `Sum` for each shape in `fresh`, from nothing, then for each float32 array in `carried`.

    Products are under way while the body does other things, until it asks for a sum's value. One that was begun is not read or
    written, nor are its operands, before that.

    Returns:
      the sums that `carried` has become, all done.
    """
    if interpret:
        # As `mma`: the interpreter has sums of tiles in shared memory, from nothing, only.
        sums = [Sum(shape=shape) for shape in fresh], [Sum(value=total) for total in carried]
        body(*sums[0], *sums[1])
        return [one.value() for one in sums[1]]

    def outer(carried_refs):
        def inner(*fresh_refs):
            body(*map(Sum, fresh_refs), *map(Sum, carried_refs))

        pl.run_scoped(inner, *(plgpu.ACC(shape, jnp.float32) for shape in fresh))

    return pl.run_state(outer)([plgpu.ACC.init(total) for total in carried])
