"""The backward pass of attention on Hopper GPUs in one kernel and in two, beside cuDNN.

Command:   python -m jaxpar.experiments.bench.attention_backward       (on a Hopper GPU with JAX 0.11 or newer)
Expected:  a table, and results/attention_backward_gpu.json. The one that is there was put together from two runs of the same
           calls on H100s before this command had its name: one kernel took 0.84 of the time of two at head size 128 and
           0.76 at 64, where every query head has keys of its own.

bfloat16, causal, 8192 tokens. Milliseconds are those of all that runs on the device for a call (`tuning.timing`); the
median of `--rounds`. `backward` is dq, dk and dv from the forward pass's log-sum-exp and the row sums of out times its cotangent,
which are given; cuDNN's is forward and backward less forward. `difference` is the largest relative Frobenius norm between one kernel
and two, of dq, dk and dv.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
from pathlib import Path

from jaxpar.experiments.bench.train_step import RESULTS, describe

SHAPES = {
    "16 heads of 128, batch 2": (2, 8192, 16, 16, 128),
    "32 heads of 128, 8 of keys": (1, 8192, 32, 8, 128),
    "32 heads of 64, batch 2": (2, 8192, 32, 32, 64),
}
"""B, T, H, G, K."""


def measure(shape, rounds: int) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxpar.pallas_kernels.attention import MaskSpec, attention, mosaic_gpu
    from jaxpar.pallas_kernels.attention.block import dropped
    from jaxpar.pallas_kernels.tuning.timing import Sampler

    def time(function, *arrays):
        """Milliseconds, and what the function gives."""
        sampler = Sampler(function, [arrays])
        return 1e3 * statistics.median(sampler.sample() for _ in range(rounds)), sampler.output()

    B, T, H, G, K = shape
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = (B, T, H, K), (B, T, G, K), (B, T, G, K), (B, T, H, K)
    q, k, v, d_out = (jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(keys, sizes, strict=True))
    mask, scale = MaskSpec(), K**-0.5
    call = lambda name, **more: lambda *x: attention(*x, mask=mask, scale=scale, implementation=name, **more)
    both = lambda q, k, v, d_out: jax.vjp(call("cudnn"), q, k, v)[1](d_out)
    forward, (out, lse) = time(call("mosaic_gpu", lse_out=True), q, k, v)
    given = q, k, v, lse, dropped(out, d_out, jnp.zeros_like(lse)), d_out
    found, results = {"forward": forward, "cudnn forward": time(call("cudnn"), q, k, v)[0]}, []
    found["cudnn forward and backward"] = time(both, q, k, v, d_out)[0]
    for count, name in ((1, "one kernel"), (2, "two kernels")):
        plan = mosaic_gpu.plan(q, k, v, mask=mask, scale=scale)
        plan = dataclasses.replace(plan, tiles=dataclasses.replace(plan.tiles, kernels_back=count))
        if mosaic_gpu.Call(plan, q, k, mask, (0, 0)).may_be_one(plan.tiles.kernels_back) != (count == 1):
            continue
        back = lambda q, k, v, lse, drop, d_out, plan=plan: plan.backward(q, k, v, mask, (0, 0), lse, drop, d_out)
        found[f"backward, {name}"], outputs = time(back, *given)
        results.append([np.asarray(x, np.float32) for x in outputs])
    if len(results) == 2:
        pairs = zip(*results, strict=True)
        found["difference"] = float(max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs))
    return found


def table(found: dict) -> str:
    names = (
        "forward", "backward, one kernel", "backward, two kernels", "cudnn forward", "cudnn forward and backward",
        "difference",
    )  # fmt: skip
    lines = ["| shape | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for shape, row in found.items():
        cell = lambda name, row=row: "-" if name not in row else f"{row[name]:{'.0e' if name == names[-1] else '.3f'}}"
        lines.append(f"| {shape} | " + " | ".join(map(cell, names)) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args(argv)
    import jax

    from jaxpar.pallas_kernels import gpu
    from jaxpar.pallas_kernels.tiles import chip

    kind = jax.devices()[0].device_kind
    if chip(kind) != "hopper" or not gpu.MAY_ADD:
        parser.error(f"needs a Hopper GPU and JAX 0.11 or newer, and here are a {kind} and JAX {jax.__version__}")
    words = sys.argv[1:] if argv is None else argv
    about = describe() | {
        "command": shlex.join(["python", "-m", "jaxpar.experiments.bench.attention_backward", *words])
    }
    found = {name: measure(shape, options.rounds) for name, shape in SHAPES.items()}
    print(table(found))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "attention_backward_gpu.json").write_text(json.dumps({**about, "milliseconds": found}, indent=1))
    return found


if __name__ == "__main__":
    main()
