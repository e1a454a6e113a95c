"""The parity matrix: every factorisation of the devices, every kind of sequence attention, every schedule, every form of
products over the tensor axis, beside one device.

Command:   python -m jaxpar.experiments.parity.matrix                       (8 fake devices, models llama, gpt2, gemma)
           python -m jaxpar.experiments.parity.matrix --devices 16 --models llama
           python -m jaxpar.experiments.parity.matrix --models "exits in stages" --only "stage(2)"
           python -m jaxpar.experiments.parity.matrix --models "short window" --only "short window: data"
           python -m jaxpar.experiments.parity.matrix --only "sequence(2)"   (the case of this name, or all that have it in it)
Expected:  a quarter to half a minute a case on two CPU cores, nearly all of it compiling: one to two hours for 8 devices (229
           cases), two for 16 (334). Every line ends with ok; results/matrix_<devices>.json and .md are written after each
           case, and a case that stands there is not run again. The exit code is 1 where one differs.

A case that cannot be (more stages than layers, heads that do not divide) is listed with the sentence that refuses it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from jaxpar.parallel.mesh import AXES, MeshConfig, factorisations, fake_devices
from jaxpar.parallel.pipeline.config import PipelineConfig
from jaxpar.parallel.sequence.config import SequenceConfig
from jaxpar.parallel.tensor.config import TensorConfig

RESULTS = Path(__file__).resolve().parent / "results"
ATTENTIONS = ("ring", "ring_bidirectional", "tokenring", "rsa", "ulysses", "hybrid")
LAYOUTS = ("contiguous", "striped", "zigzag")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe-v")
HOWS = (("one-kind", "inputs"), ("one-kind", "residuals"), ("mixed", "inputs"), ("mixed", "residuals"))
PRODUCTS = ("sharded", "gathered", "ring", "weave")
"""Beside "whole", which all other cases have."""
INSIDE = ("exits", "exits in stages", "two modules, routers", "mixture of depths")
"""Models with losses of their own inside of stages: where asked for, in every schedule too."""
REACHING = ("deep delta over tokens", "short window")
"""Models whose layers look at earlier tokens of the stream: where asked for, in every layout of a row too."""


def cases(devices: int, models: list[str]) -> Iterator[tuple[str, str, MeshConfig, dict]]:
    """(name, model, mesh, further arguments of `build`)."""
    for model in models:
        for sizes in factorisations(devices, len(AXES)):
            mesh = MeshConfig(**dict(zip(AXES, sizes, strict=True)))
            yield f"{model}: {mesh}", model, mesh, {}
    for text in (f"data={devices // 4},sequence=4", f"data={devices // 8},stage=2,sequence=2,tensor=2"):
        mesh = MeshConfig.parse(text)
        for attention in ATTENTIONS:
            for layout in LAYOUTS:
                how = SequenceConfig(attention, layout=layout)
                yield f"llama: {mesh}, {attention}, {layout}", "llama", mesh, {"sequence": how}
    for text in (f"data={devices // 4},stage=2,tensor=2", f"data={devices // 4},stage=4"):
        mesh = MeshConfig.parse(text)
        for schedule in SCHEDULES:
            for ticks, keep in HOWS:
                how = PipelineConfig(schedule, 4, ticks=ticks, keep=keep)
                yield f"llama: {mesh}, {schedule}, {ticks}, {keep}", "llama", mesh, {"pipeline": how}
    for model in (name for name in INSIDE if name in models):
        mesh = MeshConfig.parse(f"data={devices // 8},stage=2")
        for schedule in SCHEDULES:
            how = PipelineConfig(schedule, 4, keep="residuals")
            yield f"{model}: {mesh}, {schedule}, residuals", model, mesh, {"pipeline": how}
    for model in (name for name in REACHING if name in models):
        for text in (f"data={devices // 4},sequence=4", f"data={devices // 8},stage=2,sequence=2,tensor=2"):
            mesh = MeshConfig.parse(text)
            for attention in ("ring", "hybrid"):
                for layout in LAYOUTS:
                    how = SequenceConfig(attention, layout=layout)
                    yield f"{model}: {mesh}, {attention}, {layout}", model, mesh, {"sequence": how}
            for products in PRODUCTS if mesh.tensor > 1 else ():
                yield f"{model}: {mesh}, products {products}", model, mesh, {"tensor": TensorConfig(products)}
    for text, used in (
        (f"data={devices // 4},fsdp=2,tensor=2", models),
        (f"data={devices // 8},stage=2,fsdp=2,tensor=2", models),
        (f"data={devices // 8},fsdp=2,sequence=2,tensor=2", ["llama"]),
        (f"data={devices // 8},stage=2,sequence=2,tensor=2", ["llama"]),
        (f"data={devices // 8},stage=2,tensor=4", ["llama"]),
        (f"data={devices // 8},tensor=8", ["llama"]),
    ):
        mesh = MeshConfig.parse(text)
        for model in used:
            for products in PRODUCTS:
                yield f"{model}: {mesh}, products {products}", model, mesh, {"tensor": TensorConfig(products)}


def run_case(model: str, mesh: MeshConfig, how: dict) -> dict:
    """Errors and seconds of one case, or why it cannot be. Rows and tokens are as many as the devices need."""
    from jaxpar.experiments.parity.compare import LENGTH, MODELS, ROWS, errors, reference, run, too_large

    start = time.perf_counter()
    devices = math.prod(mesh.sizes.values())
    size = {"rows": max(ROWS, devices), "length": max(LENGTH, 2 * devices)}
    try:
        found = run(MODELS[model], mesh, **size, **how)
    except ValueError as error:
        return {"refused": str(error)}
    expected = reference(model, **size)
    worst = errors(found, expected)
    verdict = "; ".join(too_large(found, expected)) or "ok"
    return {"verdict": verdict, **{k: v[0] for k, v in worst.items()}, "seconds": time.perf_counter() - start}


def table(results: dict[str, dict]) -> str:
    lines = ["| case | losses | gradients | parameters | verdict |", "|---|---|---|---|---|"]
    for name, row in results.items():
        if "refused" in row:
            lines.append(f"| {name} | - | - | - | refused: {row['refused']} |")
        else:
            numbers = " | ".join(f"{row[k]:.1e}" for k in ("losses", "gradients", "parameters"))
            lines.append(f"| {name} | {numbers} | {row['verdict']} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8, help="fake CPU devices; a multiple of 8")
    parser.add_argument("--models", nargs="*", default=["llama", "gpt2", "gemma"])
    parser.add_argument("--only", default="", help="the case of this name, or all whose name has it in it")
    parser.add_argument("--again", action="store_true", help="run cases again that stand in the results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args(argv)
    if options.devices % 8 or options.devices < 8:
        parser.error(f"--devices {options.devices} must be a multiple of 8")
    fake_devices(options.devices)
    import jax

    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"matrix_{options.devices}.json"
    results = json.loads(file.read_text())["results"] if file.is_file() else {}
    asked = list(cases(options.devices, options.models))
    one = [case for case in asked if case[0] == options.only]
    for name, model, mesh, how in one or asked:
        if options.only not in name or (name in results and not options.again):
            continue
        results[name] = run_case(model, mesh, how)
        print(f"{name}: {results[name].get('verdict', 'refused')}", flush=True)
        about = {
            "date": datetime.date.today().isoformat(),
            "jax": jax.__version__,
            "command": " ".join(["python -m jaxpar.experiments.parity.matrix", *sys.argv[1:]]),
        }
        file.write_text(json.dumps({**about, "results": results}, indent=1))
        file.with_suffix(".md").write_text(table(results))
    return int(any(row.get("verdict", "ok") != "ok" for row in results.values()))


if __name__ == "__main__":
    sys.exit(main())
