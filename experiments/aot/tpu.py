"""Training steps compiled for real TPU slices on a machine that has none: memory, collectives, and what hides them.

Command:   python -m jaxpar.experiments.aot.tpu                        (extra `tpu-aot`)
           python -m jaxpar.experiments.aot.tpu --only ring v5p        (the cases whose name has one of these in it)
           python -m jaxpar.experiments.aot.tpu --parts memory         (1F1B, GPipe and GPipe by autodiff alone)
Expected:  one or two minutes a case on two CPU cores, half an hour for all; results/tpu.json and tpu.md are written after
           each with its date, and a case that stands there is not compiled again (--again does).

What is compiled is the whole step of a run (model, clipping, AdamW, the state donated), traced from shapes alone: nothing
is initialised. Its devices describe a slice (`jaxpar.parallel.topology`), and libtpu's XLA makes of it what it would
make there. Read from what comes out:

    bytes        temporary, argument and code bytes of a device, by XLA's own account
    collectives  each kind, its mesh axes, how often a step, and bytes (`jaxpar.parallel.collectives`)
    beside it    what the schedule lets run between its beginning and its end (`jaxpar.parallel.overlap`): a collective is
                 hidden where at least one matrix product is. "pair": begun and waited for on two lines of the schedule;
                 "fused": carried on inside products; "alone": all wait for it. Cycles are XLA's estimates.

That a product runs beside a collective does not say that it is long enough to hide it whole: this needs the machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from jaxpar.config import RunConfig
from jaxpar.data.config import DataConfig
from jaxpar.parallel.mesh import MeshConfig
from jaxpar.parallel.pipeline.config import PipelineConfig
from jaxpar.parallel.sequence.config import SequenceConfig
from jaxpar.parallel.tensor.config import TensorConfig
from jaxpar.presets import llama

RESULTS = Path(__file__).resolve().parent / "results"
SMALL = 1 << 16
"""Bytes below which a collective is left out of the table: statistics and labels. They stand in the JSON."""


@dataclass(frozen=True)
class Case:
    """A training step and the slice that it is for.

    Attributes:
      topology: as `jaxpar.parallel.topology.tpu_devices` takes it.
      mesh: as on the command line.
      rows, length: the global batch.
      width: of the model, 8 layers deep; heads are 128 wide.
      how: further fields of the run's configuration.
    """

    topology: str
    mesh: str
    rows: int
    length: int
    width: int = 1024
    how: dict = field(default_factory=dict)

    def config(self, tiny: bool) -> RunConfig:
        """The run. `tiny`: a model of width 64 and rows of 512 tokens, which compile in seconds, but do not fit on the chip."""
        length = min(self.length, 512) if tiny else self.length
        heads = 8 if tiny else self.width // 128
        size = dict(vocabulary=128, hidden=128) if tiny else dict(vocabulary=8192)
        model = llama(8, 64 if tiny else self.width, heads, context=length, dtype="bfloat16", **size)
        data = DataConfig(batch=self.rows, length=length)
        return RunConfig(model=model, data=data, mesh=MeshConfig.parse(self.mesh), **self.how)


def pipeline(schedule: str, microbatches: int, products: str = "gathered", **more) -> dict:
    config = PipelineConfig(schedule, microbatches, keep="residuals", **more)
    return {"pipeline": config, "tensor": TensorConfig(products)}


STEPS = {
    f"{case.topology}: {name}": case
    for name, case in (
        ("PP × TP × DP", Case("v5e:2x4", "data=2,stage=2,tensor=2", 16, 1024, how=pipeline("1f1b", 8))),
        (
            "PP × TP (whole) × DP",
            Case("v5e:2x4", "data=2,stage=2,tensor=2", 16, 1024, how=pipeline("1f1b", 8, "whole")),
        ),
        ("ring × DP", Case("v5e:2x4", "data=2,sequence=4", 4, 4096)),
        ("FSDP × TP", Case("v5e:2x4", "fsdp=4,tensor=2", 16, 1024)),
        ("hybrid × DP", Case("v5e:2x4", "data=2,sequence=4", 4, 4096, how={"sequence": SequenceConfig("hybrid")})),
        *(
            (f"TP × DP, {how}", Case("v5e:2x4", "data=2,tensor=4", 16, 1024, how={"tensor": TensorConfig(how)}))
            for how in ("whole", "sharded", "gathered", "ring", "weave")
        ),
        (
            "PP × SP × TP × DP",
            Case("v5e:4x4", "data=2,stage=2,sequence=2,tensor=2", 16, 2048, how=pipeline("1f1b", 8)),
        ),
        ("PP × FSDP × TP", Case("v5e:4x8", "stage=4,fsdp=4,tensor=2", 64, 1024, how=pipeline("1f1b", 16))),
        ("PP × TP × DP", Case("v5p:2x2x2", "data=2,stage=2,tensor=2", 16, 1024, how=pipeline("1f1b", 8))),
        ("ring × DP", Case("v6e:2x4", "data=2,sequence=4", 4, 4096)),
    )
}
MEMORY = {
    f"{name}, {m} microbatches": Case("v5e:2x2", "stage=4", m, 512, 512, pipeline(schedule, m, **more))
    for name, schedule, more in (
        ("1f1b", "1f1b", {}),
        ("gpipe", "gpipe", {}),
        ("gpipe by autodiff", "gpipe", {"executor": "autodiff"}),
    )
    for m in (8, 16, 32)
}
PARTS = {"steps": STEPS, "memory": MEMORY}


def compiled(case: Case, tiny: bool) -> dict:
    """What there is to say about one case."""
    from jaxpar.explaining import lower_step
    from jaxpar.parallel.overlap import overlaps
    from jaxpar.parallel.topology import tpu_devices

    devices = tpu_devices(case.topology)
    config = case.config(tiny)
    start = time.perf_counter()
    lowered = lower_step(config, config.model, case.topology)
    traced = time.perf_counter() - start
    step = lowered.compile()
    seconds = time.perf_counter() - start - traced
    memory = step.memory_analysis()
    return {
        "topology": case.topology,
        "kind": devices[0].device_kind,
        "devices": len(devices),
        "mesh": case.mesh,
        "rows": case.rows,
        "length": config.data.length,
        "trace_s": traced,
        "compile_s": seconds,
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "collectives": [o.record() for o in overlaps(step.as_text(), config.mesh.sizes)],
    }


def kinds(collectives: list[dict]) -> Iterator[dict]:
    """One row for each kind of collective, its axes, and how it is scheduled, hidden ones apart; small ones left out."""
    groups: dict[tuple, list[dict]] = {}
    for one in collectives:
        if one["bytes"] >= SMALL:
            key = (one["op"], tuple(one["axes"] or ["?"]), one["how"], one["products"] > 0)
            groups.setdefault(key, []).append(one)
    for (op, axes, how, _), ones in sorted(groups.items()):
        products = [one["products"] for one in ones]
        cycles = [one["cycles"] for one in ones]
        yield {
            "op": op,
            "axes": "×".join(axes),
            "how": how,
            "times": sum(one["times"] for one in ones),
            "bytes": sum(one["bytes"] * one["times"] for one in ones),
            "products": (min(products), max(products)),
            "cycles": (min(cycles), max(cycles)),
        }


def table(results: dict[str, dict[str, dict]]) -> str:
    """Both parts in Markdown."""
    lines = []
    if steps := results.get("steps"):
        lines += [
            "| step | mesh | collective | axes | a step | MB a step | products beside it | thousand cycles |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, row in steps.items():
            if "refused" in row:
                lines.append(f"| {name} | {row['refused']} | | | | | | |")
                continue
            where = f"{row['mesh']}; {row['compile_s']:.0f} s, {mib(row['temporary_bytes'])} MiB"
            for kind in kinds(row["collectives"]):
                beside = "alone" if kind["how"] == "alone" else f"{kind['how']}, {span(*kind['products'])}"
                cycles = "-" if kind["how"] == "alone" else span(*(c // 1000 for c in kind["cycles"]))
                lines.append(
                    f"| {name} | {where} | {kind['op']} | {kind['axes']} | {kind['times']} | {kind['bytes'] / 1e6:.1f} | "
                    f"{beside} | {cycles} |"
                )
                name = where = ""
        lines.append("")
    if memory := results.get("memory"):
        lines += ["| schedule | temporary MiB a device | argument MiB |", "|---|---|---|"]
        for name, row in memory.items():
            if "refused" in row:
                lines.append(f"| {name} | {row['refused']} | |")
            else:
                lines.append(f"| {name} | {mib(row['temporary_bytes'])} | {mib(row['argument_bytes'])} |")
        lines.append("")
    return "\n".join(lines)


def mib(count: int) -> str:
    return f"{count / 2**20:.1f}"


def span(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--only", nargs="*", default=[""], help="cases whose name has one of these in it")
    parser.add_argument("--tiny", action="store_true", help="the same steps of a tiny model")
    parser.add_argument("--again", action="store_true", help="compile cases again that stand in the results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "tpu.json"
    results = json.loads(file.read_text())["results"] if file.is_file() else {}
    from jaxpar.parallel.topology import installed

    if not installed():
        parser.error("compiling for TPUs needs libtpu; install jaxpar[tpu-aot]")
    for part in options.parts:
        found = results.setdefault(part, {})
        for name, case in PARTS[part].items():
            wanted = any(word in name for word in options.only)
            if not wanted or (name in found and not options.again):
                continue
            try:
                found[name] = compiled(case, options.tiny)
            except Exception as error:
                # What XLA refuses (more memory than the chip has) is a result; what we refuse is a mistake here.
                if type(error).__name__ != "JaxRuntimeError":
                    raise
                found[name] = {"refused": str(error).partition("\n")[0]}
            found[name]["date"] = datetime.date.today().isoformat()
            print(f"{name}: {found[name].get('refused') or seconds(found[name])}", flush=True)
            about = {
                "python": platform.python_version(),
                "versions": {package: metadata.version(package) for package in ("jax", "jaxlib", "libtpu")},
                "command": " ".join(["python -m jaxpar.experiments.aot.tpu", *sys.argv[1:]]),
            }
            file.write_text(json.dumps({**about, "results": results}, indent=1))
            file.with_suffix(".md").write_text(table(results))
    return 0


def seconds(row: dict) -> str:
    return f"compiled in {row['compile_s']:.1f} s, {mib(row['temporary_bytes'])} MiB of temporaries a device"


if __name__ == "__main__":
    sys.exit(main())
