"""`kill -9` at random moments of continuous saving: what is left is always a state that was really saved, bitwise."""

import random
import signal
import subprocess
import sys
import threading
import time

import pytest

# Each life restores, checks what it got, and saves one state after another until it is killed.
LIFE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jaxpar.checkpoint import Checkpoints
from jaxpar.step import TrainState

def state(step):
    noise = np.random.default_rng(step).standard_normal((3, 16, 64), np.float32)
    return TrainState(
        step=jnp.int32(step), params={"a": jnp.asarray(noise[0]), "b": {"c": jnp.asarray(noise[1])}},
        opt_state=(jnp.asarray(noise[2]),), key=jax.random.key(step), data_position=jnp.int32(8 * step),
        slots={"ema": jnp.float32(step)},
    )

def same(a, b):
    a, b = (x.replace(key=jax.random.key_data(x.key)) for x in (a, b))
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)))

jax.block_until_ready(state(0))
print("ready", flush=True)
sys.stdin.readline()
checkpoints = Checkpoints(sys.argv[1], config={"model": {}}, keep=2, say=lambda text: print("said", text, flush=True))
found = checkpoints.restore(state(0))
step = 0
if found is not None:
    step = int(found[0].step)
    assert same(found[0], state(step)), f"step {step} is not what was saved"
print("restored", step, flush=True)
while True:
    step += 1
    checkpoints.save(state(step), finite=True)
    if step % 3:
        checkpoints.wait()
        print("complete", step, flush=True)
    checkpoints.check()
"""


class Life:
    def __init__(self, folder):
        self.process = subprocess.Popen(
            [sys.executable, "-c", LIFE, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.lines = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(iter(self.process.stdout.readline, "")))
        self.reader.start()

    def wait_for(self, word, timeout=120):
        end = time.monotonic() + timeout
        while not any(line.startswith(word) for line in self.lines):
            assert self.process.poll() is None, "".join(self.lines)
            assert time.monotonic() < end, "".join(self.lines)
            time.sleep(0.005)

    def go(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def kill(self):
        alive = self.process.poll() is None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.reader.join()
        self.process.stdin.close()
        self.process.stdout.close()
        assert alive, "".join(self.lines)

    def last(self, word):
        """The number in the last line that starts with `word`, or None."""
        numbers = [int(line.split()[1]) for line in self.lines if line.startswith(word)]
        return numbers[-1] if numbers else None


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    rng = random.Random(0)
    known, kills, during_a_save = 0, 0, 0
    ahead = Life(tmp_path / "run")  # the next one imports while this one is being killed
    ahead.wait_for("ready")
    try:
        while kills < 14:
            life, ahead = ahead, Life(tmp_path / "run")
            life.wait_for("ready")
            life.go()
            if kills % 4:  # every fourth dies while it starts and restores
                life.wait_for("complete")
            time.sleep(rng.uniform(0.0, 0.5))
            life.kill()
            kills += 1
            during_a_save += any("orbax-checkpoint-tmp" in p.name for p in (tmp_path / "run").iterdir())
            restored = life.last("restored")
            assert restored is None or restored >= known, f"step {known} was complete, but {restored} came back"
            known = max(known, restored or 0, life.last("complete") or 0)
    finally:
        ahead.kill()
    assert known > 20
    assert during_a_save >= 3  # the kills did hit
