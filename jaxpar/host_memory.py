"""Keep freed memory in the process: on a CPU, XLA asks for the buffers of every step anew.

glibc gives blocks of more than a few megabytes back to the kernel as soon as they are freed, and the kernel hands the
next step's out again page by page, each filled with zeros. A training step with 150 MB of intermediate results pays about
40,000 page faults, a tenth to a fifth of its time on two cores (`experiments.bench.train_step --plain-malloc`).
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # <malloc.h>
MADV_HUGEPAGE = 14  # <sys/mman.h>
HUGE = 2 * 2**20
"""Bytes of a huge page on x86-64 and most of arm64."""
MOST = 4 * 2**30
"""Bytes of address space that are marked for huge pages; of more than a quarter of the machine's memory, never."""


def settle() -> None:
    """`keep`, once, unless JAX will find an accelerator: what a process that trains calls first of all."""
    global _settled
    if not _settled and not accelerator():
        _settled = True
        keep()


_settled = False


def accelerator() -> bool:
    """Whether JAX will find a GPU or TPU; asked without importing or starting it."""
    jax = sys.modules.get("jax")
    if platforms := os.environ.get("JAX_PLATFORMS", "") if jax is None else jax.config.jax_platforms:
        return not platforms.startswith("cpu")
    return any(next(Path("/dev").glob(name), None) for name in ("nvidia[0-9]*", "kfd", "accel[0-9]*", "vfio/[0-9]*"))


def keep() -> bool:
    """Tell glibc's allocator to keep what is freed, in one arena, in huge pages where the kernel gives them.

    To be called before anything makes threads (NumPy does on import): an arena of theirs does not go away, and another
    thread may be given it. Nothing is touched: memory is taken up when it is first used, as before. What has once been
    used stays with the process until it ends.

    Returns:
      Whether it was done: False where the allocator is not glibc's (macOS, Windows, musl).
    """
    try:
        libc = ctypes.CDLL(None)
        _ = libc.gnu_get_libc_version
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # -1 is never: any limit that fits an int would give back at once what is marked below, which is more.
    done = [mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1), mallopt(M_ARENA_MAX, 1)]
    _mark_huge(libc)
    return all(done)


def _mark_huge(libc) -> None:
    """Grow the heap once, mark the new part, and free it into the heap again. Without huge pages: no change."""
    size = min(MOST, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block is None:
        return
    first = -(-block // HUGE) * HUGE
    libc.madvise(first, (block + size - first) // HUGE * HUGE, MADV_HUGEPAGE)
    libc.free(block)
