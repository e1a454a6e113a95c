"""A program of threads as a call in a kernel: inlined, or computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from jaxpar.pallas_kernels.lanes.chip import Chip, Pointer, Word
from jaxpar.pallas_kernels.lanes.memory import THREADS, Kind
from jaxpar.pallas_kernels.lanes.threads import Array, Threads


def strided(count: int):
    """`count` words of each thread as an array [count · 128]: word n of thread i is its number n · 128 + i."""
    return plgpu.Layout.WG_STRIDED((count * THREADS,), vec_size=1)


def run(
    body: Callable,
    refs: Sequence,
    kinds: Sequence[Kind],
    state: Sequence,
    numbers: Sequence,
    count: int,
    *,
    interpret=False,
):
    """Run `body(machine, memories, words, numbers)`, which returns words.

    Args:
      refs, kinds: of memory; the body gets a memory for each, to be given to the machine.
      state: float32 arrays [n · 128], as `strided`: words of each thread. The body gets one list of all.
      numbers: int32 scalars; words for the body.
      count: of the float32 words that the body returns.

    Returns:
      float32 [count · 128]; None where that is 0.
    """
    if interpret:
        memories = [Array(ref, kind) for ref, kind in zip(refs, kinds, strict=True)]
        words = [word for some in state for word in some.reshape(-1, THREADS)]
        numbers = [jnp.broadcast_to(jnp.asarray(one, jnp.int32), (THREADS,)) for one in numbers]
        found = body(Threads(), memories, words, numbers)
        for memory in memories:
            memory.write_back()
        return jnp.stack(found).reshape(-1) if count else None

    def inline(ctx, *args):
        del ctx
        places = [Pointer(arg, kind) for arg, kind in zip(args, kinds, strict=False)]
        some, rest = args[len(places) :][: len(state)], args[len(places) + len(state) :]
        first = lambda register: Word(vector.extract(register, dynamic_position=[], static_position=[0]))
        words = [first(register) for array in some for register in array.registers.flat]
        found = body(Chip(), places, words, [Word(number.registers.item()) for number in rest])
        if not count:
            return ()
        wide = ir.VectorType.get((1,), ir.F32Type.get())
        registers = np.empty((count,), object)
        registers[:] = [vector.broadcast(wide, word.value) for word in found]
        return mgpu.FragmentedArray(_registers=registers, _layout=strided(count).to_mgpu(), _is_signed=None)

    types = [plgpu.RefType(kind.transforms) for kind in kinds]
    types += [strided(array.shape[0] // THREADS) for array in state]
    types += [plgpu.Layout.WG_SPLAT(())] * len(numbers)
    out = plgpu.ShapeDtypeStruct((count * THREADS,), jnp.float32, layout=strided(count)) if count else ()
    given = [*refs, *state, *(jnp.asarray(one, jnp.int32) for one in numbers)]
    found = plgpu.inline_mgpu(arg_types=tuple(types), return_type=out)(inline)(*given)
    return found if count else None
