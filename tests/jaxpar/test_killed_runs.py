"""Real training processes, really killed: the same command again, and the run is bitwise the uninterrupted one."""

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.processes import start

STEPS = 60
OPTIONS = [
    f"--steps={STEPS}",
    "--checkpoint-every=3",
    "--evaluate-every=20",
    "--sample.tokens=0",
    "--progress=lines",
    "--no-baseline",
    "--step.ema=ema",
    "--step.spikes=skip-spikes",
]


def command(folder: Path) -> list[str]:
    return ["-m", "jaxpar", "train", "tiny", f"--folder={folder}", *OPTIONS]


def losses(folder: Path) -> dict:
    """Everything that was measured in a run, but for how fast it went."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "time") and not name.startswith("speed/"):
                assert (row["step"], name) not in found, f"{name} of step {row['step']} was written twice"
                found[row["step"], name] = value
    return found


def parameters(folder: Path) -> dict[str, np.ndarray]:
    import jax

    from jaxpar.loading import load
    from jaxpar.models.spec import path_name

    leaves = jax.tree_util.tree_flatten_with_path(load(folder).params)[0]
    return {path_name(path): np.asarray(x) for path, x in leaves}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    process = start(command(folder))
    assert process.wait(300) == 0, process.output
    return folder


def assert_same_run(folder: Path, reference: Path) -> None:
    assert losses(folder) == losses(reference)
    ours, theirs = parameters(folder), parameters(reference)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def checkpoints(folder: Path) -> list[Path]:
    found = [p for p in (folder / "checkpoints").glob("*") if re.fullmatch(r"step-?_?\d+|\d+", p.name)]
    return sorted(found, key=lambda p: int(re.sub(r"\D", "", p.name)))


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments(uninterrupted, tmp_path):
    """Among the kills: a checkpoint that is cut short, and one that is missing."""
    folder = tmp_path / "killed"
    draw = random.Random(0)
    torn = missing = False
    for kills in range(20):
        before = checkpoints(folder)
        process = start(command(folder))
        # Half of them anywhere from the start of Python on, half while steps and saves are running.
        if kills % 2 == 0:
            time.sleep(draw.uniform(0.2, 8.0))
        else:
            deadline = time.monotonic() + 300
            going = lambda until=deadline, process=process: process.popen.poll() is None and time.monotonic() < until
            while "step " not in process.output and going():
                time.sleep(0.01)
            # However slow the machine is at the moment, there are two checkpoints before long.
            while not missing and checkpoints(folder) == before and going():
                time.sleep(0.01)
            time.sleep(draw.uniform(0.0, 0.4))
        process.kill()
        whole = checkpoints(folder)
        if kills >= 5 and not torn and len(whole) >= 2:
            biggest = max((p for p in whole[-1].rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
            biggest.write_bytes(biggest.read_bytes()[: biggest.stat().st_size // 2])
            torn = True
        elif torn and not missing and len(whole) >= 2:
            shutil.rmtree(whole[-1])
            missing = True
    assert torn, "no two checkpoints were ever there at once"
    assert missing, "no two checkpoints were ever there at once"
    for again in ("the rest of it", "nothing but its end, which is not told twice"):
        process = start(command(folder))
        assert process.wait(300) == 0, (again, process.output)
        assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_and_the_same_command_goes_on(uninterrupted, tmp_path, sign):
    folder = tmp_path / "stopped"
    process = start(command(folder))
    process.wait_for("step ", 120)
    process.kill(sign)
    code = process.wait(120)
    assert code == 128 + sign, process.output
    assert "goes on from there" in process.output
    stopped = int(re.search(r"stopped after step (\d+)", process.output)[1])
    process = start(command(folder))
    assert process.wait(300) == 0, process.output
    assert f"going on from step {stopped} of {STEPS}" in process.output
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("8", "data=2,fsdp=2,tensor=2"), ("2", "fsdp=2")),
        (("8", "data=2,stage=2,tensor=2"), ("4", "stage=2,sequence=2")),
    ],
    ids=lambda mesh: mesh[1],
)
def test_another_mesh_goes_on_within_reduction_noise(uninterrupted, tmp_path, first, second):
    """Eight devices begin, others go on: the same batches, and losses equal to float32 reductions in another order."""
    folder = tmp_path / "moved"
    process = start([*command(folder), f"--fake-devices={first[0]}", f"--mesh={first[1]}"])
    process.wait_for("step ", 200)
    process.kill(signal.SIGTERM)
    process.wait(120)
    process = start([*command(folder), f"--fake-devices={second[0]}", f"--mesh={second[1]}"])
    assert process.wait(300) == 0, process.output
    assert "going on from step" in process.output
    expected, found = losses(uninterrupted), losses(folder)
    for step in range(1, STEPS + 1):
        assert found[step, "loss"] == pytest.approx(expected[step, "loss"], rel=2e-3), step
        assert found[step, "tokens"] == expected[step, "tokens"], step
    assert found[STEPS, "held_out/loss"] == pytest.approx(expected[STEPS, "held_out/loss"], rel=2e-3)
