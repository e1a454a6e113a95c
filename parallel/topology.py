"""Devices of TPU slices that are not there: programs compile for them on any machine, and cannot run.

XLA's TPU compiler is in the `libtpu` package (extra `tpu-aot`).
"""

from __future__ import annotations

import importlib.util
import os
import sys

SETTINGS = {
    # libtpu asks a cloud's metadata server about the machine that it is on, unless it is told.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # It locks the machine for one process, for the sake of chips that a compiler does not touch.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def installed() -> bool:
    """Whether there is a compiler for TPUs here."""
    return importlib.util.find_spec("libtpu") is not None


def tpu_devices(name: str) -> list:
    """The devices of a slice by its name: `v5e:2x4`, `v5p:2x2x2`, `v6e:4x4`, ...

    They describe themselves (kind, coordinates), so that `jaxpar.parallel.mesh.make_mesh` lays a mesh along their links.
    Arrays on them are `jax.ShapeDtypeStruct`s. JAX itself stays on the CPU if it has not started.

    Raises:
      ValueError: libtpu is not installed, or knows no such slice.
    """
    if not installed():
        raise ValueError(f"compiling for {name} needs libtpu; install jaxpar[tpu-aot]")
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    bridge = sys.modules.get("jax._src.xla_bridge")
    if bridge is None or not bridge.backends_are_initialized():
        import jax

        jax.config.update("jax_platforms", "cpu")
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except JaxRuntimeError as error:
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"topology {name!r}: libtpu describes no such slice; write for instance v5e:2x4 ({why})"
        ) from error
