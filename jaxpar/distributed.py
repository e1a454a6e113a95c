"""Several processes as one machine: a thin start of `jax.distributed`. XLA, NCCL/ICI and Gloo do the rest.

On Slurm, Open MPI, Kubernetes and TPU pods the environment says who is who, and `initialise()` needs no arguments. On a
laptop it does nothing. Anywhere else: the same command on every machine, with `--coordinator`, `--process-count` and
each its own `--process-id`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from jaxpar import __version__, rollcall
from jaxpar.errors import UserError


def initialise(
    coordinator: str | None = None,
    process_count: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: float = 300.0,
) -> str | None:
    """Join the processes of a run. Call it before anything asks JAX for a device.

    Args:
      coordinator: `host:port` of process 0, a port that is free there. None: ask the environment.
      process_count: processes of the run. 1 without a coordinator: one process, whatever the environment says.
      process_id: of this process, from 0.
      timeout_s: seconds within which all processes must have come.

    Returns:
      What joined them ("coordinator", "slurm", "openmpi", "kubernetes", "tpu"), or None where this process is alone.

    Raises:
      UserError: arguments that do not fit together, an address that does not answer, a process that does not come, or
        JAX in use already.
    """
    import jax

    if coordinator is None and process_count == 1:
        return None
    cluster = detect()
    if coordinator is None:
        for name, value in (("process count", process_count), ("process id", process_id)):
            if value is not None:
                raise UserError(f"a {name} ({value}) needs a coordinator: give host:port of process 0")
        if cluster is None:
            return None
    else:
        host, port = _address(coordinator)
        _check_ids(coordinator, process_count, process_id)
    _require_fresh(jax)
    # CPU devices of several processes talk through Gloo; other backends bring their own collectives.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    seconds = max(1, round(timeout_s))
    if coordinator is not None:
        rollcall.call(host, port, process_count, process_id, f"jaxpar {__version__}, jax {jax.__version__}", timeout_s)
        jax.distributed.initialize(
            coordinator,
            process_count,
            process_id,
            cluster_detection_method="deactivate",
            initialization_timeout=seconds,
        )
        return "coordinator"
    if cluster == "kubernetes" and importlib.util.find_spec("kubernetes") is None:
        raise UserError(
            "this pod belongs to an indexed Kubernetes job; to join its processes, pip install 'jax[k8s]', or give a "
            "coordinator, process count and process id (a process count of 1 runs alone)"
        )
    try:
        jax.distributed.initialize(local_device_ids=_slurm_devices(os.environ), initialization_timeout=seconds)
    except (ValueError, RuntimeError, OSError) as error:
        if cluster != "tpu":
            raise UserError(f"the processes of this {cluster} job could not be joined: {error}") from error
        # One TPU host needs no joining, and only Google's metadata service could tell; here it did not.
        warnings.warn(f"a TPU is here but no pod was found; this process runs alone ({error})", stacklevel=2)
        return None
    return cluster


def is_main() -> bool:
    """Whether this process writes files and prints: exactly one does."""
    import jax

    return jax.process_index() == 0


def detect(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> str | None:
    """The cluster whose environment variables this process was started with; None for a machine on its own."""
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in slurm) and _number(environment, "SLURM_NTASKS") > 1:
        return "slurm"
    if "OMPI_MCA_orte_hnp_uri" in environment and _number(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        return "openmpi"
    if _number(environment, "MEGASCALE_NUM_SLICES") > 1 or any(
        "," in environment.get(name, "") for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    ):
        return "tpu"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "kubernetes"
    # A TPU machine of Google Compute Engine says nothing in the environment: JAX asks the metadata service there.
    asked = not {"TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"} & set(environment)
    has_tpu = (devices / "accel0").exists() or (devices / "vfio" / "0").exists()
    return "tpu" if asked and has_tpu and importlib.util.find_spec("libtpu") is not None else None


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdigit() else 0


def _slurm_devices(environment: Mapping[str, str]) -> list[int] | None:
    """The GPUs of this process where Slurm runs one task a node: all of them. JAX by itself would take the first only,
    as if there were one task a GPU."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    gpus = _number(environment, "SLURM_GPUS_ON_NODE")
    return list(range(gpus)) if gpus and re.fullmatch(r"1(\(x\d+\))?", tasks) else None


def _address(coordinator: str) -> tuple[str, int]:
    host, colon, port = coordinator.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"coordinator {coordinator!r} is not host:port, such as 10.0.0.1:8476")
    return host.strip("[]"), int(port)


def _check_ids(coordinator: str, count: int | None, process: int | None) -> None:
    for name, value in (("process count", count), ("process id", process)):
        if value is None:
            raise UserError(f"coordinator {coordinator} needs a {name} too, on each of the processes")
    if count < 1:
        raise UserError(f"a process count of {count} is no run; give at least 1")
    if not 0 <= process < count:
        raise UserError(f"process id {process} is outside 0 to {count - 1}: the process count is {count}")


def _require_fresh(jax) -> None:
    from jax._src import xla_bridge  # there is no public way to ask without starting a backend

    if xla_bridge.backends_are_initialized():
        raise UserError(
            "processes must be joined before the first use of JAX, but it has started with "
            f"{jax.device_count()} {jax.default_backend()} device(s) already"
        )
