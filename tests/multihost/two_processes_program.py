"""A program that several processes run together: a sum over all of them, and an array made shard by shard.

Arguments: coordinator, process count, process id.
"""

import sys

from jaxpar.distributed import initialise, is_main

coordinator, count, process = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
assert initialise(coordinator, count, process, timeout_s=60) == "coordinator"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from jaxpar.parallel.mesh import MeshConfig, make_mesh  # noqa: E402
from jaxpar.parallel.rules import Rules, batch_sharding  # noqa: E402

assert jax.process_count() == count
assert jax.process_index() == process
assert is_main() == (process == 0)
mesh = make_mesh(MeshConfig(data="rest", fsdp=2))
rows = 4 * count
whole = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
asked = []


def shard(index):
    asked.append(index[0].start or 0)
    return whole[index]


array = jax.make_array_from_callback(whole.shape, batch_sharding(mesh, Rules()), shard)
total = jax.jit(jnp.sum)(array)
print(f"process {process}: devices {jax.local_device_count()} of {jax.device_count()}, rows {sorted(set(asked))}")
print(f"process {process}: total {float(total)}")
