"""Programs for the threads of a warpgroup, written once: inlined into a Mosaic GPU kernel, or run for all 128 threads at once.

Pallas' operations are of whole warpgroups. What a thread's registers hold, and what a warp alone does with its matrix and
exchange instructions, is not said by them, and the interpreter does not know it. A program here is a function of a machine, of
memories and of words: a word is 32 bits of each thread, a number or bits, and has Python's operators. `Chip` writes them into
the kernel, `Threads` computes them with `jax.numpy` on arrays [128]. So the interpreter's tests see every line of a program,
and only what one instruction does stands in two places.

    def body(machine, memories, words, numbers): ...; return words
    words = lanes.run(body, refs, kinds, [words], numbers, count, interpret=...)

Instructions: PTX ISA 9.0, "Matrix Fragments for mma.m16n8k16", `ldmatrix`, `movmatrix`, `shfl`. In their words a lane is
4 · group + pair; a matrix of 8 rows of 16 bytes has row `group` and its 32-bit column `pair` at a lane.
"""

from jaxpar.pallas_kernels.lanes.memory import CHUNK, NUMBERS, THREADS, Kind, place
from jaxpar.pallas_kernels.lanes.run import run, strided
from jaxpar.pallas_kernels.lanes.threads import Threads

__all__ = ["CHUNK", "NUMBERS", "THREADS", "Kind", "Threads", "place", "run", "strided"]
