"""Parallel programs on fake devices: what can be measured honestly there, which is ratios.

Command:   python -m jaxpar.experiments.bench.parallel                  (all parts)
           python -m jaxpar.experiments.bench.parallel --parts ticks    (one of them)
Expected:  about ten minutes on two CPU cores; a table for each part, a plot, and results/parallel.json.

    overhead   seconds of a step through the pipeline's executor on one device, over those of the same microbatches
               accumulated without it, paired in rounds. Goal: below 1.03, over a step that computes the same: one that
               remakes a stage as a whole makes each layer's last product again too, which one that remakes layer by
               layer does not (`inputs, over remat by layer` says what that costs).
    compile    seconds to trace and compile 1F1B of 16 stages and 64 microbatches, over those of GPipe differentiated by
               JAX. Goal: below 3.
    ticks      lock-step seconds over the ideal m·(F + B), for each schedule, in its better form (nothing runs).
    memory     temporary bytes of a compiled step against the number of microbatches: 1F1B, GPipe, GPipe by autodiff.
    bytes      what a compiled step permutes over stage and sequence, over what the formulas say.
    flops      executed FLOPs of matrix products of all devices together, over those of the same batch on one device: 1 is
               ideal. Loops are multiplied out. In a pipeline of one-kind ticks devices compute in the bubble as well. What
               stands in a branch counts on every device, so the head does, which only the last stage runs; schedules
               with mixed ticks, which are all branches, are left out: their tables say what a device runs.
    processes  seconds of a step of two processes with a device each, joined by Gloo, over those of one process with two
               devices, and the relative difference of their losses.

Each part runs in a process of its own, because the number of fake devices is fixed when JAX starts.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from jaxpar import host_memory
from jaxpar.experiments.bench.train_step import RESULTS, describe

PARTS = {"overhead": 1, "compile": 16, "ticks": 1, "memory": 4, "bytes": 8, "flops": 4, "processes": 2}
"""Each part and its fake devices."""
JOINED = ("data=2", "fsdp=2", "tensor=2", "stage=2", "sequence=2")
"""Meshes of two devices, in one process or in two."""
ROUNDS = 25


def model(layers: int, width: int, **more):
    from jaxpar.presets import llama

    return llama(layers, width, 4, vocabulary=512, context=256, **more)


def batch(rows: int, length: int, vocabulary: int):
    """Random tokens, one document a row."""
    import numpy as np

    from jaxpar.step import Batch

    draw = np.random.default_rng(0)
    tokens = draw.integers(0, vocabulary, (rows, length + 1), np.int32)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    ones = np.ones((rows, length), np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], ones, places, ones.astype(np.int32), np.arange(rows, dtype=np.int32))


def remade_by_stage(cfg):
    """A step's `grad_fn` that keeps what enters the layers and makes all of them again for the backward pass."""
    import jax

    from jaxpar.models import decoder
    from jaxpar.models.context import Context
    from jaxpar.step import Gradients

    def loss(params, batch, key):
        ctx = Context(batch.positions, batch.segments, key=key, sample_ids=batch.sample_ids)
        stage = jax.checkpoint(lambda layers, state: decoder.blocks(cfg, layers, state, ctx)[0])
        state = stage(params["layers"], decoder.embed(cfg, params, batch.tokens, ctx))
        sums = decoder.head(cfg, params, state, ctx, batch.targets, batch.weights)
        return sums.loss_sum, sums.weight_sum

    def grad_fn(params, batch, control, key):
        (loss_sum, weight_sum), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        return Gradients(loss_sum, weight_sum, grads)

    return grad_fn


def gradients(cfg, mesh_text: str, microbatches: int, rows: int, length: int, pipeline=None, sequence=None, how=None):
    """(function, arguments) of the gradients of a batch on a mesh; without a pipeline, accumulated over microbatches.
    `how`: a `grad_fn` in place of the program's own."""
    import jax

    from jaxpar.optimisers import make
    from jaxpar.optimisers_config import SGD
    from jaxpar.parallel.mesh import MeshConfig, make_mesh
    from jaxpar.program import build
    from jaxpar.step import chain
    from jaxpar.steps.accumulate import accumulate
    from jaxpar.steps.base import make_step

    config = MeshConfig.parse(mesh_text)
    mesh = make_mesh(config, jax.devices()[: math.prod(config.sizes.values())])
    parts = 1 if pipeline else microbatches
    program = build(
        cfg, mesh, rows=rows // parts, length=length, pipeline=pipeline, sequence=sequence, staged=pipeline is not None
    )
    step = chain(make_step(how or program.grad_fn, make(SGD(), program.specs, steps=1)), accumulate(parts))
    params = program.init(jax.random.key(0))
    state = jax.jit(step.init)(params, jax.random.key(1))
    data = jax.device_put(batch(rows, length, cfg.vocabulary), program.batch_sharding)
    return jax.jit(lambda state, data: step.gradients(state, data, None)), (state, data)


def overhead() -> dict:
    """Medians over rounds of the executor's time over plain accumulation's."""
    import jax

    from jaxpar.parallel.pipeline.config import PipelineConfig

    cfg = model(4, 256, layer_loop="unroll")
    by_layer = model(4, 256, layer_loop="unroll", remat="full")
    size = ("", 4, 16, 128)
    found = {}
    for keep, plains in (
        ("residuals", {"residuals": gradients(cfg, *size)}),
        (
            "inputs",
            {
                "inputs": gradients(cfg, *size, how=remade_by_stage(cfg)),
                "inputs, over remat by layer": gradients(by_layer, *size),
            },
        ),
    ):
        piped = gradients(cfg, *size, PipelineConfig("1f1b", size[1], keep=keep))
        runs = {name: (f.lower(*args).compile(), args) for name, (f, args) in {**plains, "piped": piped}.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for round_ in range(ROUNDS + 1):
            # Every other round the other way around, and the first to warm up.
            for name, (f, args) in list(runs.items())[:: 1 - round_ % 2 * 2]:
                start = time.perf_counter()
                jax.block_until_ready(f(*args))
                seconds[name] += [time.perf_counter() - start] if round_ else []
        for name in plains:
            ratio = statistics.median(b / a for a, b in zip(seconds[name], seconds["piped"], strict=True))
            found[name] = {"ratio": ratio, "plain_s": statistics.median(seconds[name]), "rounds": ROUNDS}
    return found


def compile_time() -> dict:
    from jaxpar.parallel.pipeline.config import PipelineConfig

    found = {}
    for name, pipeline in (
        ("gpipe by autodiff", PipelineConfig("gpipe", 64, executor="autodiff")),
        ("1f1b", PipelineConfig("1f1b", 64)),
        ("1f1b, residuals", PipelineConfig("1f1b", 64, keep="residuals")),
    ):
        f, args = gradients(model(16, 64), "stage=16", 64, 64, 32, pipeline)
        start = time.perf_counter()
        lowered = f.lower(*args)
        traced = time.perf_counter() - start
        lowered.compile()
        found[name] = {"trace_s": traced, "total_s": time.perf_counter() - start}
    for row in found.values():
        row["ratio"] = row["total_s"] / found["gpipe by autodiff"]["total_s"]
    return found


def ticks() -> dict:
    from jaxpar.parallel.pipeline.choose import compare
    from jaxpar.parallel.pipeline.simulate import Costs

    found = {}
    for stages, m in ((4, 8), (4, 32), (8, 32)):
        rows, refused = compare(stages, m, 2, Costs())
        for row in rows:
            if row.name == "skippipe":
                continue  # its microbatches leave stages out: less work, not less waiting
            # Seconds of a device's whole stage, F + B = 3: what m microbatches take without a bubble.
            found[f"{row.name}, {stages} stages, {m} microbatches"] = {
                "ratio": row.choice.seconds / (3 * m),
                "ticks": row.choice.table.length,
                "form": row.choice.ticks,
            }
        found |= {f"{name}, {stages} stages, {m} microbatches": {"refused": why} for name, why in refused.items()}
    return found


def memory() -> dict:
    from jaxpar.parallel.pipeline.config import PipelineConfig

    found = {}
    for name, pipeline in (
        ("1f1b", PipelineConfig("1f1b", keep="residuals")),
        ("gpipe", PipelineConfig("gpipe", keep="residuals")),
        ("gpipe by autodiff", PipelineConfig("gpipe", keep="residuals", executor="autodiff")),
    ):
        for m in (8, 16, 32):
            from dataclasses import replace

            how = replace(pipeline, microbatches=m)
            f, args = gradients(model(8, 64, layer_loop="unroll"), "stage=4", m, 2 * m, 32, how)
            found[f"{name}, {m} microbatches"] = {
                "bytes": f.lower(*args).compile().memory_analysis().temp_size_in_bytes
            }
    return found


def moved() -> dict:
    """Bytes that a device permutes in a step, compiled and by formula."""
    from jaxpar.parallel.collectives import count
    from jaxpar.parallel.mesh import AXES, MeshConfig
    from jaxpar.parallel.pipeline.config import PipelineConfig
    from jaxpar.parallel.sequence.choose import Workload, bytes_per_link
    from jaxpar.parallel.sequence.config import SequenceConfig

    def permuted(mesh_text: str, axis: str, **how) -> int:
        f, args = gradients(cfg, mesh_text, 1, rows, length, **how)
        sizes = MeshConfig.parse(mesh_text).sizes
        counted = count(f.lower(*args).compile().as_text(), {a: sizes[a] for a in AXES})
        of = [c for c in counted.collectives if c.op == "collective-permute" and c.axes == (axis,)]
        return sum(c.nbytes * c.times for c in of)

    cfg, rows, length = model(4, 64), 8, 64
    table = PipelineConfig("1f1b", 4).table(4, rows // 2)
    # One permute a tick that sends, wanted or not: the activation of a microbatch's rows.
    expected = table.length * (rows // 2 // 4) * length * cfg.width * 4
    found = {"stage": (permuted("data=2,stage=4", "stage", pipeline=PipelineConfig("1f1b", 4)), expected)}
    for kind in ("ring", "tokenring"):
        work = Workload(length, heads=4, kv_heads=4, head_size=16, devices=4, itemsize=4, batch=rows // 2)
        ways = [bytes_per_link(kind, work), bytes_per_link(kind, work, backward=True)]
        expected = cfg.layers * sum(t.total for t in ways)
        got = permuted("data=2,sequence=4", "sequence", sequence=SequenceConfig(kind))
        found[f"sequence, {kind}"] = (got, expected)
    return {name: {"bytes": got, "formula": want, "ratio": got / want} for name, (got, want) in found.items()}


def product_flops(hlo: str) -> int:
    """2·n·m·k of every matrix product that a device executes in a compiled program."""
    from jaxpar.parallel.hlo import parse

    module = parse(hlo)
    dims = lambda shape: [int(n) for n in re.findall(r"\d+", re.search(r"\[([\d,]*)\]", shape)[1])]
    total = 0
    for run in module.runs()[0]:
        for one in (inside for instruction in run.body for inside in module.fused(instruction)):
            if one.opcode == "dot":
                left = dims(module.named[one.operands[0]].shape)
                contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)[1]
                inner = math.prod(left[int(d)] for d in contracted.split(",") if d)
                total += run.times * 2 * math.prod(dims(one.shape)) * inner
    return total


def flops() -> dict:
    from jaxpar.parallel.pipeline.config import PipelineConfig
    from jaxpar.parallel.sequence.config import SequenceConfig

    def of(cfg, mesh_text, m, **how) -> int:
        f, args = gradients(cfg, mesh_text, m, rows, length, **how)
        return product_flops(f.lower(*args).compile().as_text())

    rows, length = 16, 64
    cfg, found = model(8, 64), {}
    by_layer = model(8, 64, remat="full")
    plain, remade, one = of(cfg, "data=1", 8), of(by_layer, "data=1", 8), of(cfg, "data=1", 1)
    for name in ("gpipe", "1f1b", "interleaved"):
        for keep, base in (("residuals", plain), ("inputs", remade)):
            got = 4 * of(cfg, "stage=4", 8, pipeline=PipelineConfig(name, 8, keep=keep))
            found[f"{name}, {keep}, 4 stages, 8 microbatches"] = {"flops": got, "ratio": got / base}
    for mesh in ("data=4", "fsdp=4", "tensor=4"):
        got = 4 * of(cfg, mesh, 1)
        found[mesh] = {"flops": got, "ratio": got / one}
    for kind, layout in (("ring", "contiguous"), ("ring", "zigzag"), ("ulysses", "contiguous")):
        got = 4 * of(cfg, "sequence=4", 1, sequence=SequenceConfig(kind, layout=layout))
        found[f"sequence=4, {kind}, {layout}"] = {"flops": got, "ratio": got / one}
    return found


def step_times() -> dict:
    """By mesh: the median of a step's seconds, and its loss."""
    import jax

    from jaxpar.parallel.pipeline.config import PipelineConfig

    found = {}
    for mesh in JOINED:
        pipeline = PipelineConfig("1f1b", 4) if "stage" in mesh else None
        f, args = gradients(model(4, 128), mesh, 1, 8, 128, pipeline)
        run, seconds = f.lower(*args).compile(), []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            loss = float(jax.block_until_ready(run(*args)).loss_sum)
            seconds.append(time.perf_counter() - start)
        found[mesh] = {"seconds": statistics.median(seconds[2:]), "loss": loss}
    return found


def processes() -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jaxpar.experiments.bench.parallel", "--here", "--parts", "processes"]
    joined = [
        subprocess.Popen([*command, "--join", f"127.0.0.1:{port}", str(i)], stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    texts = [one.communicate()[0] for one in joined]
    if any(one.returncode for one in joined):
        raise RuntimeError(f"the two processes ended with {[one.returncode for one in joined]}")
    two, alone = json.loads(texts[0].splitlines()[-1]), step_times()
    return {
        mesh: {
            "ratio": two[mesh]["seconds"] / alone[mesh]["seconds"],
            "seconds": two[mesh]["seconds"],
            "loss differs": abs(two[mesh]["loss"] / alone[mesh]["loss"] - 1),
        }
        for mesh in JOINED
    }


RUN = {
    "overhead": overhead,
    "compile": compile_time,
    "ticks": ticks,
    "memory": memory,
    "bytes": moved,
    "flops": flops,
    "processes": processes,
}


def plot(found: dict, file: Path) -> None:
    """Memory against microbatches, and lock-step time against the ideal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    lines: dict[str, list[tuple[int, float]]] = {}
    for name, row in found.get("memory", {}).items():
        schedule, _, rest = name.rpartition(", ")
        lines.setdefault(schedule, []).append((int(rest.split()[0]), row["bytes"] / 2**20))
    for schedule, points in lines.items():
        left.plot(*zip(*points, strict=True), marker="o", label=schedule)
    left.set(xlabel="microbatches", ylabel="temporary MiB (4 fake devices)", ylim=(0, None))
    if lines:
        left.legend()
    bars = {name: row["ratio"] for name, row in found.get("ticks", {}).items() if "ratio" in row and "8 micro" in name}
    right.barh([name.partition(",")[0] for name in bars], list(bars.values()))
    right.set(xlabel="lock-step time over the ideal, 4 stages, 8 microbatches")
    figure.tight_layout()
    figure.savefig(file)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--here", action="store_true", help="run one part in this process and print it as JSON")
    parser.add_argument("--join", nargs=2, metavar=("ADDRESS", "PROCESS"), help="be one of the two processes")
    parser.add_argument("--out", type=Path, default=RESULTS / "parallel.json", help="the JSON file to write")
    options = parser.parse_args(argv)
    if options.here:
        from jaxpar.parallel.mesh import fake_devices

        [part] = options.parts
        if options.join:
            from jaxpar.start import start

            start(
                fake_devices=1,
                compile_cache=False,
                coordinator=options.join[0],
                processes=2,
                process=int(options.join[1]),
            )
            found = step_times()
            print(json.dumps(found))
            return found
        host_memory.settle()
        fake_devices(PARTS[part])
        found = RUN[part]()
        print(json.dumps(found))
        return found
    results = json.loads(options.out.read_text())["results"] if options.out.is_file() else {}
    about = {**describe(), "command": " ".join(["python -m jaxpar.experiments.bench.parallel", *sys.argv[1:]])}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        command = [sys.executable, "-m", "jaxpar.experiments.bench.parallel", "--here", "--parts", part]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{part} failed: {done.stderr[-2000:]}")
        results[part] = json.loads(done.stdout.splitlines()[-1])
        print(f"\n{part}")
        for name, row in results[part].items():
            print(
                f"  {name:<44}"
                + "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            )
        options.out.write_text(json.dumps({**about, "results": results}, indent=1))
        plot(results, options.out.with_suffix(".png"))
    return results


if __name__ == "__main__":
    main()
