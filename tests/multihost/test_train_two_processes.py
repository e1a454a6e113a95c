"""`jaxpar train` as two real processes: the losses of one process, and bitwise the same after an interruption."""

import json
import random
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.processes import Process, free_port, start

STEPS = 64
OPTIONS = [
    "--layers=2",
    "--width=32",
    "--heads=4",
    f"--steps={STEPS}",
    "--warmup=2",
    "--length=64",
    "--batch=8",
    "--evaluate-every=32",
    "--checkpoint-every=16",
    "--checkpoint-keep=9",
    "--sample.tokens=8",
    "--progress=lines",
    "--step.ema=ema",
]


def command(folder: Path, *more: str) -> list[str]:
    options = [f"--folder={folder}", f"--source={folder.parent / 'text.txt'}", *OPTIONS, *more]
    return ["-m", "jaxpar", "train", "tiny", *options]


def write_text(folder: Path) -> None:
    draw = random.Random(0)
    words = ["def", "return", "(", ")", "x", "y", "=", "+", "1", "self.", "import", "\n"]
    (folder / "text.txt").write_text(" ".join(draw.choice(words) for _ in range(20_000)))


def pair(folder: Path, *more: str, devices: int = 1) -> list[Process]:
    address = f"--distributed.coordinator=127.0.0.1:{free_port()}"
    return [
        start(
            command(folder, address, "--distributed.processes=2", f"--distributed.process={i}", *more), devices=devices
        )
        for i in range(2)
    ]


def finish(processes: list[Process], code: int = 0) -> None:
    try:
        for process in processes:
            assert process.wait(240) == code, "\n---\n".join(p.output for p in processes)
    finally:
        for process in processes:
            process.kill()


def measured(folder: Path) -> dict:
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name not in ("step", "time") and not name.startswith("speed/"):
                assert (row["step"], name) not in found, f"{name} of step {row['step']} was written twice"
                found[row["step"], name] = value
    return found


def parameters(folder: Path) -> list[np.ndarray]:
    import jax

    from jaxpar.loading import load

    return [np.asarray(x) for x in jax.tree.leaves(load(folder).params)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run as two processes of one device each, and one as a single process with two devices."""
    folder = tmp_path_factory.mktemp("runs")
    write_text(folder)
    processes = pair(folder / "two", "--mesh=data=2")
    finish(processes)
    assert "held-out loss" in processes[0].output
    # Process 1 says nothing: one line each, not one for each process.
    assert "step " not in processes[1].output, processes[1].output
    one = start(command(folder / "one", "--mesh=data=2"), devices=2)
    finish([one])
    return folder


def test_two_processes_train_as_one(runs):
    two, one = measured(runs / "two"), measured(runs / "one")
    assert two.keys() == one.keys()
    assert {step for step, name in two if name == "loss"} == set(range(1, STEPS + 1))
    for key in one:
        if key[1] != "sample":  # a draw can hang on the last bit of a probability
            assert two[key] == pytest.approx(one[key], rel=1e-5), key
    for a, b in zip(parameters(runs / "two"), parameters(runs / "one"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_both_write_into_one_folder_once(runs):
    names = sorted(p.name for p in (runs / "two").iterdir())
    assert sum(name.startswith("events.out.tfevents") for name in names) == 1
    assert {"checkpoints", "loss.png", "metrics.jsonl", "sample.txt"} <= set(names)
    assert (runs / "two" / "sample.txt").read_text().startswith("def ")


def test_a_signal_to_one_process_stops_both_and_they_go_on_bitwise(runs, tmp_path):
    write_text(tmp_path)
    folder = tmp_path / "stopped"
    processes = pair(folder, "--mesh=data=2")
    processes[0].wait_for(f" 1/{STEPS}", 200)
    processes[1].kill(signal.SIGTERM)
    finish(processes, 128 + signal.SIGTERM)
    stopped = int(re.search(r"stopped after step (\d+)", processes[0].output)[1])
    assert stopped < STEPS
    processes = pair(folder, "--mesh=data=2")
    finish(processes)
    assert f"going on from step {stopped} of {STEPS}" in processes[0].output
    assert measured(folder) == measured(runs / "two")
    for a, b in zip(parameters(folder), parameters(runs / "two"), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("axis", ["fsdp", "stage", "sequence"])
def test_a_model_spread_over_both_processes(runs, tmp_path, axis):
    """Each process holds half of every parameter (fsdp), half of the layers (stage) or half of each row's tokens
    (sequence); checkpoint, evaluation and sample need the whole."""
    write_text(tmp_path)
    finish(pair(tmp_path / "shared", f"--mesh={axis}=2"))
    shared, one = measured(tmp_path / "shared"), measured(runs / "one")
    for step in range(1, STEPS + 1):
        # Another layout sums in another order, and training makes last bits larger.
        rel = 1e-5 if step <= 10 else 1e-3
        assert shared[step, "loss"] == pytest.approx(one[step, "loss"], rel=rel), step
    assert shared[STEPS, "held_out/loss"] == pytest.approx(one[STEPS, "held_out/loss"], rel=1e-3)
