"""Whole runs that lose stages: exact strategies end bitwise where an uninterrupted run ends, and all of them resume."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxpar import manifest
from jaxpar.commands.base import preset, read
from jaxpar.recovery.checkpoint_rollback import CheckpointRollback
from jaxpar.recovery.plan import walk
from jaxpar.recovery.transform import RECOVERY
from jaxpar.run import prepare
from jaxpar.skipping.paths import SwapEnds
from jaxpar.train import go
from tests.recovery.small import model_of
from tests.steps.tiny import assert_bitwise, numbers

STEPS = 14
OPTIONS = (
    f"--steps {STEPS} --layers 4 --width 32 --heads 4 --model.hidden 32 --length 16 --mesh data=2,fsdp=4 --warmup 1 "
    "--evaluate-every 7 --evaluate-batches 1 --checkpoint-every 4 --sample.tokens 0 --progress lines --no-baseline "
    "--step.ema ema --ema.decay 0.9"
).split()
# Step 3 is before the first checkpoint, 13 behind the last; in 6 two stages at once, none beside the other.
LOST = "--failures.at 3:1,6:0,6:2,13:3"


def configured(folder: Path, *more: str):
    config, rest = preset(["tiny", *OPTIONS, *" ".join(more).split(), "--folder", str(folder)])
    return read(config, rest, prog="jaxpar train", description="")


def run(folder: Path, *more: str):
    """The final state (without recovery's own slot), the counters, and every line that was said."""
    said = []
    done = prepare(configured(folder, *more), said.append)
    keep = done.progress.say
    done.say = done.progress.say = lambda text: (said.append(text), keep(text))
    assert go(done, said.append).finished
    slot = done.state.slots.get(RECOVERY, {})
    counts = tuple(int(slot[name]) for name in ("failures", "replayed")) if slot else None
    return model_of(done.state), counts, "\n".join(said)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    state, counts, _ = run(folder)
    assert counts is None
    return numbers(state), {r["step"]: r["loss"] for r in lines(folder) if "loss" in r}


@pytest.mark.parametrize(
    ("options", "goes_back", "told"),
    [
        ("--recovery redundant", False, "brought back bitwise by redundant"),
        ("--recovery replica-peer", False, "brought back bitwise by replica-peer"),
        ("--recovery snapshot --recovery.every 5", True, "step 7: lost stage 3 of 4: back to step 5 from memory"),
        ("--recovery checkpoint_rollback", True, "step 3: lost stage 1 of 4: back to step 0 from disk"),
    ],
)
def test_an_exact_strategy_ends_bitwise_where_an_uninterrupted_run_ends(
    options, goes_back, told, uninterrupted, tmp_path
):
    """Parameters, moments, counts, the average of the parameters, step and position in the data, on a mesh of 8 devices;
    the losses of all steps, those done again included, are bitwise those of the other run."""
    state, counts, said = run(tmp_path, options, LOST)
    assert_bitwise(state, uninterrupted[0])
    assert counts[0] == 4
    config = configured(tmp_path, options, LOST)
    plan = walk(config.recovery, config.trace({"stage": 1}), STEPS, saved=4)
    assert counts[1] == plan.iterations - STEPS
    assert (counts[1] > 0) == goes_back
    records = lines(tmp_path)
    assert all(r["loss"] == uninterrupted[1][r["step"]] for r in records if "loss" in r)
    assert sum("loss" in r for r in records) == plan.iterations - (3 if goes_back else 0)
    assert sum("held_out/loss" in r for r in records) == 2
    assert told in said


def test_failures_are_shown_and_written(tmp_path, uninterrupted):
    """A line for each recovery, columns in the progress line, records in metrics.jsonl, tags in TensorBoard, a mark in the
    plot; and a run that is cut off in between goes on bitwise, with the strategy's state: norms, rates, replicas."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ("--recovery checkfree_plus --bump-mode compounding --no-swaps", LOST)
    state, counts, said = run(tmp_path / "whole", *options)
    assert counts == (4, 0)
    assert "step 13: lost stage 3 of 4: made anew" in said
    records = lines(tmp_path / "whole")
    found = {r["step"]: r for r in records if "recovery/lost" in r}
    assert {step: r["recovery/lost"] for step, r in found.items()} == {3: 1, 6: 2, 13: 1}
    assert all(r["recovery/unrecovered"] == 0 and r["recovery/relative_error"] > 0 for r in found.values())
    totals = [r["recovery/failures"] for r in records if "recovery/failures" in r]
    assert totals == [0] * 2 + [1] * 3 + [3] * 7 + [4] * 2
    assert any(r["loss"] != uninterrupted[1][r["step"]] for r in records if "loss" in r)  # it is not exact
    events = EventAccumulator(str(tmp_path / "whole")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("recovery/lost")] == [(3, 1), (6, 2), (13, 1)]

    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    assert manifest.steps(cut / "checkpoints") == [8, 12, 14]
    for newer in (12, 14):
        shutil.rmtree(cut / "checkpoints" / manifest.name_of(newer))
    again, counts, said = run(cut, *options)
    assert "going on from step 8 of 14" in said
    assert counts == (4, 0)
    assert_bitwise(again, state)
    strip = lambda rows: [{k: v for k, v in r.items() if not k.startswith("speed/")} for r in rows]
    assert strip(lines(cut)) == strip(records)


@pytest.mark.parametrize(
    ("options", "schedule", "kept"),
    [("--mesh data=2,stage=4", "checkfree+", None), ("--skipping layerdrop --skipping.rate 0.25", "1f1b", 0.75)],
)
def test_edge_stages_are_trained_to_stand_in_for_each_other(options, schedule, kept, tmp_path):
    """CheckFree+ brings its swapped order: in a pipeline as a schedule, elsewhere as routes, with what is skipped besides."""
    options = ("--recovery checkfree_plus --steps 6 --data.batch 16 --evaluate-every 6 --failures.at 4:0", options)
    config = configured(tmp_path, *options)
    sizes = {"data": 2, "fsdp": 4, "stage": 1, **{k: v for k, v in vars(config.mesh).items() if v != 1}}
    settled = config.settled(sizes)
    assert settled.pipeline.schedule == schedule
    order = settled.skipping if kept is None else settled.skipping.order
    assert order == (None if kept is None else SwapEnds(2, stages=4))
    plain = configured(tmp_path, *options, "--no-swaps")
    assert plain.settled(sizes) == plain
    _, counts, said = run(tmp_path, *options)
    assert counts == (1, 0)
    assert "step 4: lost stage 0 of 4: made anew" in said
    assert "each second microbatch runs the first two and the last two stages in swapped order" in said
    records = [r for r in lines(tmp_path) if "loss" in r]
    assert len(records) == 6
    shares = [r["skipping/kept"] for r in records if "skipping/kept" in r]
    assert (np.mean(shares) == pytest.approx(kept, abs=0.2)) if kept else not shares


def test_the_step_without_failures_is_not_compiled_again(tmp_path):
    """Losses are data: one program for steps, one for recoveries."""
    done = prepare(configured(tmp_path, "--recovery check-free-plus --no-swaps", LOST), lambda text: None)
    assert done.losses is not None
    with done:
        batch = next(done.batches())
        jax.block_until_ready(done.update(batch))
        with jax.log_compiles(), jax.transfer_guard_device_to_host("disallow"):
            failed_S = np.array([True, False, True, False])
            _, step, metrics = done.losses.mend(done.state, batch, done.step, failed_S)
    assert step == 1
    assert float(metrics["recovery/lost"]) == 2


def test_a_checkpoint_rollback_needs_no_checkpoint(tmp_path):
    assert CheckpointRollback().back_to(np.array([True]), 3, None) == 0


def test_names_on_the_command_line(tmp_path):
    config = configured(tmp_path, "--recovery checkfree_plus --failure-rate 0.01 --skipping layer-drop")
    assert type(config.recovery).__name__ == "CheckFreePlus"
    assert config.failures.failure_rate == 0.01
    config = configured(
        tmp_path, "--recovery composite --recovery.first redundant --recovery.then snapshot --fallible middle"
    )
    assert config.recovery.then.name == "snapshot"
    assert config.failures.fallible == "middle"
