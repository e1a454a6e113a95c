"""What kernels for Pallas' Mosaic GPU backend share: how they are called on each release of JAX, and products of tiles.

Mosaic GPU's interface changes between releases: whatever differs between 0.10.2 and 0.12 is in here. Kernels are called by
`plgpu.kernel` only (a bare `pallas_call` is another backend since 0.11), and say how they are lowered (the default changed).
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpar.pallas_kernels.varying import varies_over, varying

ROWS = 64
"""Rows of the first operand that one warpgroup multiplies (wgmma's M)."""
MAY_INTERPRET = hasattr(plgpu, "InterpretGPUParams")
"""Whether this JAX has a whole interpreter of Mosaic GPU kernels: since 0.11."""


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
      scratch: `plgpu.SMEM`, `plgpu.Barrier`; shared by the warpgroups of a block.
      approximate: take the chip's fast exp2, log2 and reciprocal.
    """
    more = {"kernel_name": name} if name else {}
    run = plgpu.kernel(
        body,
        out_type=list(outs),
        scratch_types=list(scratch),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
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


_TAKES_INDEX = "idx" in signature(plgpu.load).parameters


def load(ref, layout=None):
    """All of a reference as an array with this layout over the threads."""
    return plgpu.load(ref, (), layout=layout) if _TAKES_INDEX else plgpu.load(ref, layout=layout)


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
