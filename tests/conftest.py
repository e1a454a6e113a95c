"""One process with eight fake CPU devices, a persistent compile cache, and strict flags."""

import os
from pathlib import Path

from tests.flags import QUICK

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax-tests"

# Before JAX starts: it reads these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
if os.environ["JAX_PLATFORMS"] == "cpu" and "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += f" {QUICK}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

from jaxpar import host_memory  # noqa: E402

host_memory.settle()

import gc  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# The same examples on every run: a change that breaks something is the one that fails.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")

jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes many objects that live on, and a collection looks at all that do. What is imported by now is never looked at
# again, the rest less often.
gc.freeze()
gc.set_threshold(10_000, 10, 10)


@pytest.fixture(scope="session")
def devices():
    """The eight fake devices of this process."""
    found = jax.devices()
    assert len(found) == 8, f"the suite needs 8 fake CPU devices, found {len(found)}"
    return found


MAPS = 12_000
"""Each compiled CPU program keeps some memory maps, and Linux gives a process 65,530 (vm.max_map_count): behind that the
compiler aborts. The suite compiles more programs than that in one process."""


@pytest.fixture(autouse=True)
def _programs_are_dropped(request):
    """Compiled programs are dropped now and then; those that are needed again come from the cache on disk."""
    yield
    session = request.session
    session.jaxpar_tests = getattr(session, "jaxpar_tests", 0) + 1
    if session.jaxpar_tests % 10 == 0 and _maps() > MAPS:
        jax.clear_caches()
        gc.collect()


def _maps() -> int:
    try:
        with open("/proc/self/maps", "rb") as file:
            return sum(1 for _ in file)
    except OSError:  # not Linux
        return 0
