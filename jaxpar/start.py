"""What must happen before JAX starts: fake devices, the allocator, the compile cache, other processes."""

from __future__ import annotations

from collections.abc import Callable


def start(
    *,
    fake_devices: int | None = None,
    compile_cache: bool = True,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Call once, before anything asks JAX for a device.

    Args:
      fake_devices: make the CPU look like this many devices.
      compile_cache: keep compiled programs on disk.
      coordinator, processes, process: see `jaxpar.distributed.initialise`.
      say: where a notice goes.

    Raises:
      ValueError, UserError: a number that cannot be, an address that does not answer.
    """
    from jaxpar.parallel.mesh import fake_devices as fake

    if fake_devices is not None:
        fake(fake_devices)
    from jaxpar import compile_cache as cache
    from jaxpar import distributed, host_memory

    host_memory.settle()
    distributed.initialise(coordinator, processes, process)
    cache.enable(compile_cache, say=say)
