"""Two real processes under `jax.distributed` (Gloo on loopback) save together; any number of devices reads it."""

import shutil
import socket
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpar import manifest
from jaxpar.checkpoint import Checkpoints
from jaxpar.step import TrainState

COMMON = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
task, folder, port, process = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxpar.checkpoint import CheckpointError, Checkpoints
from jaxpar.step import TrainState

mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4), ("data",))
rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

def state(step):
    make = lambda: TrainState(
        step=jnp.int32(step), params={"w": jnp.arange(64.0).reshape(8, 8) * step}, opt_state=(jnp.ones(8) * step,),
        key=jax.random.key(step), data_position=jnp.int32(8 * step), slots={"ema": jnp.full((8, 8), step / 3)},
    )
    shape = jax.eval_shape(make)
    return jax.jit(make, out_shardings=jax.tree.map(lambda x: rows if x.ndim == 2 else everywhere, shape))()

def same(a, b):
    a, b = (x.replace(key=jax.random.key_data(x.key)) for x in (a, b))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)
        for s, t in zip(x.addressable_shards, y.addressable_shards, strict=True):
            assert np.array_equal(s.data, t.data)

say = lambda text: print("said", text, flush=True)
checkpoints = Checkpoints(folder, config={"model": {"width": 8}}, keep=2, say=say)
"""

SAVE = """
assert checkpoints.restore(state(0)) is None
for step in (1, 2, 3):
    assert checkpoints.save(state(step), finite=True)
    checkpoints.check()
bad = state(4)
bad = bad.replace(params=jax.jit(lambda p: jax.tree.map(lambda x: x / 0, p))(bad.params))
assert not checkpoints.save(bad, finite=True)
assert checkpoints.latest() == 3
checkpoints.close()
"""

RESTORE = """
(back, meta) = checkpoints.restore(jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)))
print("restored", meta.step, meta.mesh["devices"], flush=True)
same(back, state(meta.step))
checkpoints.save(state(meta.step + 1), finite=True)
checkpoints.close()
"""


def two(script, folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", COMMON + script, "", str(folder), str(port), str(i)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        outputs = [p.communicate(timeout=180) for p in both]
    finally:
        for p in both:
            p.kill()
    for p, (out, err) in zip(both, outputs, strict=True):
        assert p.returncode == 0, out + err[-3000:]
    return ["".join(line for line in out.splitlines(True) if not line.startswith("[Gloo]")) for out, _ in outputs]


def state(step):
    return TrainState(
        step=jnp.int32(step),
        params={"w": jnp.arange(64.0).reshape(8, 8) * step},
        opt_state=(jnp.ones(8) * step,),
        key=jax.random.key(step),
        data_position=jnp.int32(8 * step),
        slots={"ema": jnp.full((8, 8), step / 3)},
    )


def test_two_processes(tmp_path, devices):
    run = tmp_path / "run"
    first, second = two(SAVE, run)
    assert first.splitlines() == ["said step 4 was not finite: no checkpoint is made of it"]
    assert second == ""  # only process 0 speaks
    assert manifest.steps(run) == [2, 3]

    # One process with 8 devices reads what two with 2 each wrote.
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    split = lambda x: NamedSharding(mesh, PartitionSpec(None, "data") if x.ndim == 2 else PartitionSpec())
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split(x)), state(0))
    alone = Checkpoints(run, config={"model": {"width": 8}})
    back, meta = alone.restore(target)
    words = lambda s: jax.tree.map(np.asarray, s.replace(key=jax.random.key_data(s.key)))
    chex.assert_trees_all_equal(words(back), words(state(3)))
    assert (meta.mesh["processes"], meta.mesh["devices"]) == (2, 4)
    placed = jax.tree.map(lambda x: jax.device_put(x, split(x)), state(4))
    alone.save(placed, finite=True)
    alone.close()

    # Two processes read what one wrote; then the newest is damaged, and both go back to the same one.
    first, second = two(RESTORE, run)
    assert "restored 4 8" in first
    assert "restored 4 8" in second
    shutil.rmtree(next((run / "step_00000005").glob("ocdbt.process_1")))
    first, second = two(RESTORE, run)
    assert "ignoring the damaged checkpoint" in first
    assert "restored 4 8" in first
    assert "restored 4 8" in second
    assert manifest.steps(run) == [4, 5]
