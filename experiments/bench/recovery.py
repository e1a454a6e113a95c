"""What recovery costs: a step in which nothing is lost, and bringing a stage back.

Command:   python -m jaxpar.experiments.bench.recovery --fake-devices 2       (about four minutes on two CPU cores)
           python -m jaxpar.experiments.bench.recovery --quick       (a tiny model, few rounds)
Expected:  a table, and results/recovery_<platform>.json. The goal for CheckFree's healthy step is 1.01 of the plain one.

Healthy steps. The whole step of a Llama (forward, backward, clipping, AdamW; the state donated), plain and with each strategy
that keeps something. A round runs one step of each, in turn and in the other direction the next time; quoted is the median over
rounds of the ratio to the plain step of the same round. Beside it "again": the plain step against a second copy of itself, which
says how much of a ratio is noise.

Recoveries. The program that runs where a stage is lost (stage 1 of 4): its time, the bytes that it moves between machines (from
its report), the bytes that the strategy keeps over all machines, and how far the stage's parameters are from those that were
lost. On one device nothing is really sent: the bytes are what a stage a device would send. Going back to a checkpoint is timed
with the file system that `--folder` is on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from jaxpar import host_memory
from jaxpar.experiments.bench.paired import made, rounds_of, stepping
from jaxpar.experiments.bench.train_step import QUICK, SIZES, Size
from jaxpar.parallel.mesh import fake_devices

RESULTS = Path(__file__).resolve().parent / "results"
STAGES, LOST = 4, 1


def strategies() -> dict:
    from jaxpar.recovery.checkfree import CheckFree
    from jaxpar.recovery.checkfree_plus import CheckFreePlus
    from jaxpar.recovery.copy_neighbour import CopyNeighbour
    from jaxpar.recovery.random_init import RandomInit
    from jaxpar.recovery.redundant import Redundant
    from jaxpar.recovery.replica_peer import ReplicaPeer
    from jaxpar.recovery.skip_stage import SkipStage
    from jaxpar.recovery.snapshot import Snapshot
    from jaxpar.recovery.uniform_average import UniformAverage

    found = (
        CheckFree(),
        CheckFreePlus(),
        UniformAverage(),
        CopyNeighbour(),
        RandomInit(),
        SkipStage(),
        Redundant(),
        Snapshot(),
        ReplicaPeer(),
    )
    return {strategy.name: strategy for strategy in found}


def model(size: Size):
    import jax

    from jaxpar.presets import llama

    return llama(
        size.layers,
        size.width,
        size.heads,
        hidden=size.hidden,
        vocabulary=size.vocabulary,
        context=size.length,
        layer_loop="unroll" if jax.default_backend() == "cpu" else "scan",
    )


def around(strategy):
    """A strategy's place in the chain."""
    from jaxpar.recovery.base import Stages
    from jaxpar.recovery.transform import placed

    if strategy is None:
        return ()
    return lambda program, inside: placed(inside, strategy, Stages(STAGES, program.specs, program.mesh, program.rules))


def healthy(chosen: dict, size: Size, rounds: int) -> dict:
    """The ratio of a step's seconds to the plain step's, by strategy."""
    kept = ("check-free", "check-free-plus", "redundant", "snapshot")
    steps = {"plain": None, "again": None} | {n: s for n, s in chosen.items() if n in kept}
    return rounds_of({n: stepping(model(size), size.rows, around(s))[0] for n, s in steps.items()}, rounds)


def recoveries(chosen: dict, size: Size, rounds: int, folder: Path) -> dict:
    """Seconds, bytes and error of bringing one stage back, by strategy."""
    import jax
    import jax.numpy as jnp

    from jaxpar.checkpoint import Checkpoints
    from jaxpar.recovery.transform import kept_bytes, recovery_program

    failed, found = jnp.arange(STAGES) == LOST, {}
    for name, strategy in chosen.items():
        replicas = 2 if name == "replica-peer" else 1
        if len(jax.devices()) < replicas:
            continue
        step, state, batch, _ = made(model(size), size.rows, around(strategy), replicas)
        state, _ = jax.jit(step.update)(state, batch)
        repair = jax.jit(recovery_program(step))
        _, metrics = jax.block_until_ready(repair(state, batch, failed))
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            jax.block_until_ready(repair(state, batch, failed))
            seconds.append(time.perf_counter() - start)
        told = {key.partition("/")[2]: float(value) for key, value in metrics.items()}
        assert told["unrecovered"] == 0
        found[name] = {
            "seconds": statistics.median(seconds),
            "bytes_moved": told["bytes_moved"],
            "bytes_kept": kept_bytes(state),
            "relative_error": told["relative_error"],
            "exact": bool(told["exact"]),
        }
    _, state, _, target = made(model(size), size.rows)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        checkpoints = Checkpoints(Path(place) / "checkpoints", config={"model": {}}, say=lambda text: None)
        checkpoints.save(state, finite=True)
        checkpoints.wait()
        seconds = []
        for _ in range(min(rounds, 5)):
            start = time.perf_counter()
            jax.block_until_ready(checkpoints.restore(target)[0].params)
            seconds.append(time.perf_counter() - start)
        checkpoints.close()
    size_of_state = sum(x.nbytes for x in jax.tree.leaves(state))
    found["checkpoint-rollback"] = {
        "seconds": statistics.median(seconds),
        "bytes_moved": float(size_of_state),
        "bytes_kept": 0,
        "relative_error": 0.0,
        "exact": True,
    }
    return found


def table(result: dict) -> str:
    lines = [f"{'healthy step':<22}{'ms':>9}{'ratio to plain':>16}"]
    lines += [f"{n:<22}{1e3 * f['seconds']:>9.2f}{f['ratio']:>16.4f}" for n, f in result["healthy"].items()]
    lines += ["", f"{'recovery of a stage':<22}{'ms':>9}{'MB moved':>10}{'MB kept':>9}{'error':>9}"]
    for name, f in result["recoveries"].items():
        error = "exact" if f["exact"] else f"{f['relative_error']:.3f}"
        moved, kept = f["bytes_moved"] / 1e6, f["bytes_kept"] / 1e6
        lines.append(f"{name:<22}{1e3 * f['seconds']:>9.2f}{moved:>10.2f}{kept:>9.2f}{error:>9}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, few rounds")
    parser.add_argument("--size", choices=[s.name for s in SIZES], default="small")
    parser.add_argument("--fake-devices", type=int, help="make the CPU look like so many: replica-peer needs two")
    parser.add_argument("--only", nargs="*", help="strategies to measure; all if left out")
    parser.add_argument("--rounds", type=int, default=60, help="steps of each kind that are counted")
    parser.add_argument(
        "--folder", type=Path, help="where a checkpoint is written for a while; the system's if left out"
    )
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    options = parser.parse_args(argv)
    host_memory.settle()
    if options.fake_devices is not None:
        fake_devices(options.fake_devices)
    import jax

    size = Size(**{**vars(QUICK), "layers": STAGES}) if options.quick else {s.name: s for s in SIZES}[options.size]
    if size.layers % STAGES:
        parser.error(
            f"{size.name} has {size.layers} layers, which {STAGES} stages do not divide; choose small or large"
        )
    rounds = 3 if options.quick else options.rounds
    chosen = {name: s for name, s in strategies().items() if not options.only or name in options.only}
    result = {
        "healthy": healthy(chosen, size, rounds),
        "recoveries": recoveries(chosen, size, rounds, options.folder),
    }
    print(table(result))
    if len(jax.devices()) < 2:
        print("replica-peer needs two devices and was not measured: --fake-devices 2")
    about = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "command": " ".join(["python -m jaxpar.experiments.bench.recovery", *(sys.argv[1:] if argv is None else argv)]),
        "size": vars(size),
        "rounds": rounds,
    }
    out = options.out or (None if options.quick else RESULTS / f"recovery_{jax.default_backend()}.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**about, "results": result}, indent=1))
        print(f"raw figures: {out}")
    return result


if __name__ == "__main__":
    main()
