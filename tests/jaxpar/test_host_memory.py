"""Freed memory stays with the process, and marked for huge pages: the kernel's own counts and flags say so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpar import host_memory

PROGRAM = """
import resource, sys
from jaxpar import host_memory
kept = host_memory.keep() if sys.argv[1] == "keep" else None
import jax, jax.numpy as jnp
x = jnp.ones(16 * 2**20)
@jax.jit
def step(x):
    for _ in range(4):  # 64 MB each, 16,384 pages; the barrier keeps them from being fused into one loop
        x = jax.lax.optimization_barrier(jnp.sin(x))
    return x.sum()
for _ in range(6):
    step(x).block_until_ready()
count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
found = []
for _ in range(8):
    before = count()
    step(x).block_until_ready()
    found.append(count() - before)
print(kept, min(found))  # the least: what else goes on in a process may touch new pages in any one step
"""


def faults(how: str) -> tuple[str, int]:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    run = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, env=env, check=True)
    kept, count = run.stdout.split()
    return kept, int(count)


def test_a_step_faults_no_pages():
    kept, few = faults("keep")
    if kept == "False":
        pytest.skip("the allocator is not glibc's")
    _, many = faults("plain")
    assert 2 * few < many


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="the kernel has no huge pages to give"
)
def test_the_part_of_the_heap_that_is_marked_for_huge_pages_stays():
    program = "from jaxpar import host_memory; print(host_memory.keep()); print(open('/proc/self/smaps').read())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    kept, maps = run.stdout.split("\n", 1)
    if kept == "False":
        pytest.skip("the allocator is not glibc's")
    areas = re.findall(r"^[0-9a-f]+-[0-9a-f]+ .*\[heap\]\nSize: +(\d+) kB\n(?:[A-Z].*\n)*?VmFlags:(.*)$", maps, re.M)
    marked = sum(1024 * int(size) for size, flags in areas if "hg" in flags.split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert marked >= min(host_memory.MOST, memory // 4) - 2 * host_memory.HUGE


@pytest.mark.parametrize(("platforms", "found"), [("cpu", False), ("cuda,cpu", True), ("tpu", True)])
def test_the_platform_is_known_before_it_starts(platforms, found):
    import jax

    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        assert host_memory.accelerator() is found
    finally:
        jax.config.update("jax_platforms", before)
