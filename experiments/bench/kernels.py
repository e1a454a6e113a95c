"""Kernels beside what else computes the same: every op and implementation, at shapes of real models.

Command:   python -m jaxpar.experiments.bench.kernels            (on a TPU or NVIDIA GPU: all of it; --only picks ops, models
                                                                  or shapes. Parts of it were run on an H100 and an H200)
           python -m jaxpar.experiments.bench.kernels            (on a CPU: smaller shapes, a few minutes)
           python -m jaxpar.experiments.bench.kernels --quick    (on a CPU: tiny shapes and XLA only, below a minute)
Expected:  a table, and in results/ kernels_<platform>.jsonl (a line about the machine, then a line a case), .md and .png.

    ms           median, 10th and 90th percentile of a call's seconds on the device, over rounds. A round takes a sample of each
                 implementation, every other round in the other direction. Seconds are CUPTI's on NVIDIA GPUs; elsewhere, and
                 where a sandbox refuses CUPTI, those of a loop on the device less an empty one (`tuning.timing`). Inputs are
                 normally distributed, and on a chip rotated through more memory than its caches hold.
    roofline     the seconds that the op needs at least, by the matmul rate and the copy bandwidth that are measured first in the
                 same process, over those that it took. Small arrays on a CPU lie in its caches, and may pass 1.
    to best      median over rounds of the seconds of the fastest other one that is no kernel of ours (XLA, cuDNN, cuBLAS by a plain
                 product, JAX's splash attention, tokamax, PyTorch: those that are here) over those of this one: above 1 this one is
                 faster.
    error        of the output that was timed (a part of it): Frobenius norm of the difference to float64 (on TPUs: to float32
                 with products in full precision), over float64's. Of quantised operands the values that they stand for are
                 multiplied: rounding them is no error of the product (but all there is of the plain product's, which
                 does not round x). The largest of several outputs.

On a CPU, PyTorch's threads and XLA's are in one process and in each other's way: its figures there are no comparison
(`train_step` has a process for each).

What a machine cannot run stands in the table as not measured, with the reason. Goals (for an H200 where they are numbers) are
printed under the table. Formats in 4 bits save bytes on Hopper, and no operations: it has no 4-bit product.

RMSNorm, rotary embedding, SwiGLU's gate and cross-entropy are XLA's. A kernel of ours for one of them is made only where its
roofline fraction here leaves something to win; the first three are bound by bytes, so that it is their fraction of the copy
bandwidth.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import sys
from pathlib import Path

import numpy as np

from jaxpar import host_memory
from jaxpar.experiments.bench.train_step import RESULTS, describe

GOALS = {
    "attention": "0.95 of cuDNN at head size 128, 4k to 16k tokens, bfloat16, causal",
    "attention, forward and backward": "0.95 of cuDNN at head size 128, 4k to 16k tokens, bfloat16, causal",
    "quantised product": "int8_row x int8_row 1.6 times, int4_g128 with 1 or 16 rows 3 times as fast as the bfloat16 product",
    "decode attention": "0.85 of the copy bandwidth",
}
SHORTEST = {"chip": 0.02, "cpu": 0.05, "quick": 0.002}
"""Seconds of a sample, at least."""


def ceilings(kinds, scale: str) -> dict[str, float]:
    """Operations a second of a square product of each dtype, and "copy": bytes read and written a second."""
    import jax
    import jax.numpy as jnp

    from jaxpar.pallas_kernels.tuning.timing import Sampler

    side = {"chip": 8192, "cpu": 1024, "quick": 256}[scale]
    shortest = max(SHORTEST[scale], 0.01)

    def seconds(function, *args):
        sampler = Sampler(function, [args], shortest=shortest)
        return statistics.median(sampler.sample() for _ in range(7))

    found = {}
    for kind in sorted(kinds):
        whole = kind.startswith("int")
        a, b = (jax.random.normal(jax.random.key(i), (side, side)) * (30 if whole else 1) for i in (0, 1))
        total = jnp.int32 if whole else jnp.float32
        multiply = lambda a, b, total=total: jnp.dot(a, b, preferred_element_type=total)
        found[kind] = 2 * side**3 / seconds(multiply, a.astype(kind), b.astype(kind))
    x = jnp.ones({"chip": 2**28, "cpu": 2**25, "quick": 2**20}[scale], jnp.float32)
    found["copy"] = 2 * x.size * 4 / seconds(lambda x: -x, x)
    return found


def reason(error: Exception) -> str:
    """The clause of a refusal that says why."""
    from jaxpar.pallas_kernels.tuning.search import why

    found = re.search(r'implementation="\w+" (.*?); use', str(error), re.DOTALL)
    return found[1] if found else why(error)


def samplers(case, sets, scale: str) -> tuple[dict, dict[str, str]]:
    """By contender: what takes samples; and why others have none."""
    import jax

    from jaxpar.experiments.bench.kernel_rivals import Torch, TorchSampler
    from jaxpar.pallas_kernels.tuning.search import REFUSALS
    from jaxpar.pallas_kernels.tuning.timing import Sampler

    ready, missing = {}, {}
    for name, contender in case.contenders.items():
        try:
            if isinstance(contender, str):
                missing[name] = contender
            elif isinstance(contender, Torch):
                ready[name] = TorchSampler(contender.build(sets[0]), shortest=SHORTEST[scale])
            else:
                jax.eval_shape(contender, *sets[0])
                ready[name] = Sampler(contender, sets, shortest=SHORTEST[scale])
        except REFUSALS as error:
            missing[name] = reason(error)
    return ready, missing


def error_of(case, arrays, output) -> float:
    """Of the part of the output that has an exact counterpart; the largest of several outputs."""
    import jax

    if jax.default_backend() == "tpu":
        with jax.default_matmul_precision("highest"):
            exact = case.exact(arrays, np.float32)
    else:
        with jax.enable_x64(True):
            exact = case.exact(arrays, np.float64)
    worst = 0.0
    for a, b in zip(jax.tree.leaves(case.cut(output)), jax.tree.leaves(exact), strict=True):
        a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
        worst = max(worst, float(np.linalg.norm(a - b) / np.linalg.norm(b)))
    return worst


def measure(case, limits: dict[str, float], rounds: int, scale: str) -> dict:
    """A case's line."""
    import jax

    from jaxpar.experiments.bench.kernel_cases import OURS
    from jaxpar.pallas_kernels.tuning.timing import sets_for

    make = jax.jit(case.make)
    count = sets_for(jax.eval_shape(case.make, jax.random.key(0))) if scale == "chip" else 1
    sets = [case.place(make(jax.random.key(i))) for i in range(count)]
    ready, missing = samplers(case, sets, scale)
    seconds = {name: [] for name in ready}
    for i in range(rounds):
        for name in list(ready) if i % 2 else list(reversed(ready)):
            seconds[name].append(ready[name].sample())
    least = max(case.flops / limits[case.kind], case.bytes / limits["copy"])
    rows = {}
    for name, sampler in ready.items():
        low, middle, high = np.percentile(seconds[name], (10, 50, 90))
        rows[name] = {
            "seconds": float(middle),
            "p10": float(low),
            "p90": float(high),
            "flops_per_second": case.flops / middle,
            "bytes_per_second": case.bytes / middle,
            "roofline": least / middle,
            "error": error_of(case, sets[0], sampler.output()),
            "method": sampler.method,
            "compile_s": sampler.compile_s,
            "all": seconds[name],
        }
    for name in rows:
        others = [other for other in rows if other not in (*OURS, name)]
        if others:
            best = min(others, key=lambda other: rows[other]["seconds"])
            ratios = [a / b for a, b in zip(seconds[best], seconds[name], strict=True)]
            rows[name] |= {"to_best": statistics.median(ratios), "best": best}
    rows |= {name: {"not_measured": why} for name, why in missing.items()}
    return {
        "op": case.op,
        "case": case.name,
        "model": case.model,
        "bound": "matmul" if case.flops / limits[case.kind] > case.bytes / limits["copy"] else "copy",
        "flops": case.flops,
        "bytes": case.bytes,
        "goal": GOALS.get(case.op),
        "implementations": rows,
    }


def table(about: dict, lines: list[dict]) -> str:
    """All lines in Markdown, and the goals."""
    rates = ", ".join(
        f"{name} {rate / 1e9:,.0f} G{'B' if name == 'copy' else 'op'}/s" for name, rate in about["ceilings"].items()
    )
    text = [
        f"{about['chip']}, jax {about['versions']['jax']}, {about['date']}: `{about['command']}`",
        f"Ceilings measured in the same run: {rates}.",
        "",
        "| op | case | implementation | ms (p10 to p90) | GFLOP/s | GB/s | roofline | to best | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        op, case = line["op"], f"{line['model']}: {line['case']}"
        for name, row in line["implementations"].items():
            if "not_measured" in row:
                text.append(f"| {op} | {case} | {name} | not measured: {row['not_measured']} | | | | | |")
            else:
                to_best = f"{row['to_best']:.2f} of {row['best']}" if "to_best" in row else "-"
                text.append(
                    f"| {op} | {case} | {name} | {1e3 * row['seconds']:.3f} ({1e3 * row['p10']:.3f} to {1e3 * row['p90']:.3f}) | "
                    f"{row['flops_per_second'] / 1e9:,.0f} | {row['bytes_per_second'] / 1e9:,.1f} | {row['roofline']:.2f} | "
                    f"{to_best} | {row['error']:.1e} |"
                )
            op = case = ""
    goals = {line["op"]: line["goal"] for line in lines if line["goal"]}
    text += ["", "Goals on an H200, not results:", *(f"- {op}: {goal}" for op, goal in goals.items())] if goals else []
    return "\n".join(text) + "\n"


def plot(lines: list[dict], file: Path) -> None:
    """The roofline fraction of everything that was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [
        (f"{line['op']}, {line['model']}: {line['case']}", name, row["roofline"])
        for line in lines
        for name, row in line["implementations"].items()
        if "roofline" in row
    ]
    names = sorted({name for _, name, _ in bars})
    figure, ax = plt.subplots(figsize=(10, 1.5 + 0.22 * len(bars)))
    for name in names:
        at = [i for i, bar in enumerate(bars) if bar[1] == name]
        ax.barh(at, [bars[i][2] for i in at], color=f"C{names.index(name)}", label=name)
    labels = [bar[0] if i == 0 or bars[i - 1][0] != bar[0] else "" for i, bar in enumerate(bars)]
    ax.set_yticks(range(len(bars)), labels, fontsize=6)
    ax.invert_yaxis()
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_xlabel("share of the roofline that was measured in the same run")
    ax.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds, no PyTorch")
    parser.add_argument("--only", nargs="*", default=[""], help="cases whose op, model or shape has one of these in it")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each implementation that are counted")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args(argv)
    # Two frameworks share a GPU here.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    host_memory.settle()
    import jax

    from jaxpar.experiments.bench.kernel_cases import cases

    scale = "quick" if options.quick else "cpu" if jax.default_backend() == "cpu" else "chip"
    rounds = min(options.rounds, 3) if options.quick else options.rounds
    chosen = [
        case
        for case in cases(scale)
        if any(word.lower() in f"{case.op}, {case.model}: {case.name}".lower() for word in options.only)
    ]
    if not chosen:
        parser.error(f"--only {' '.join(options.only)}: no case has any of these in it")
    about = describe()
    given = sys.argv[1:] if argv is None else argv
    about["command"] = shlex.join(["python", "-m", "jaxpar.experiments.bench.kernels", *given])
    about |= {"rounds": rounds, "scale": scale, "ceilings": ceilings({case.kind for case in chosen}, scale)}
    options.out.mkdir(parents=True, exist_ok=True)
    path, lines = options.out / f"kernels_{jax.default_backend()}.jsonl", []
    with open(path, "w") as file:
        print(json.dumps(about), file=file, flush=True)
        for case in chosen:
            lines.append(measure(case, about["ceilings"], rounds, scale))
            print(json.dumps(lines[-1]), file=file, flush=True)
            print(f"{len(lines)} of {len(chosen)}: {case.op}, {case.name}", file=sys.stderr, flush=True)
    text = table(about, lines)
    print(text)
    path.with_suffix(".md").write_text(text)
    plot(lines, path.with_suffix(".png"))
    return lines


if __name__ == "__main__":
    main()
