"""Training step: tokens a second and peak memory, beside PyTorch in the same run.

Command:   python -m jaxpar.experiments.bench.train_step              (extra `bench` for the PyTorch columns)
           python -m jaxpar.experiments.bench.train_step --quick      (one small size, a few seconds, no PyTorch)
Expected:  about 10 minutes on two CPU cores; a table, and results/train_step_<platform>.json.
           On a GPU the three sizes give way to one of a billion parameters in bfloat16, with MFU.

What is measured. A whole step of a Llama (forward, backward, clipping by the global norm, AdamW) on random tokens of one
document a row, parameters in float32. jaxpar runs its own program, step and optimiser; PyTorch runs `transformers`
LlamaForCausalLM of the same shapes (`use_cache` off), clip_grad_norm_ and AdamW (fused where the device has it), eager and
under torch.compile. bfloat16 is parameters in float32 and compute in bfloat16: our `dtype`, torch's autocast.

How. Each contender lives in a process of its own, so that peak memory is its own and thread pools do not meet. A round asks
each for one step in turn, so that a machine whose speed drifts moves all of them together. Quoted: the median over rounds of
tokens a second, and the median of the ratio to each PyTorch of the same round.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import resource
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from jaxpar import host_memory

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Size:
    """A Llama and its batch: `rows` rows of `length` tokens."""

    name: str
    layers: int
    width: int
    heads: int
    hidden: int
    vocabulary: int
    rows: int
    length: int


SIZES = (
    Size("small", 4, 128, 4, 352, 320, 8, 256),
    Size("medium", 6, 384, 6, 1024, 4096, 4, 256),
    Size("large", 12, 768, 12, 2048, 8192, 2, 256),
)
BILLION = Size("1b", 16, 2048, 32, 8192, 32768, 8, 2048)
QUICK = Size("quick", 2, 64, 4, 176, 320, 4, 64)


def jaxpar_step(size: Size, dtype: str):
    """A function that runs one step and waits for it, and the model's training FLOPs a token."""
    import jax
    import jax.numpy as jnp

    from jaxpar import flops
    from jaxpar.optimisers import make
    from jaxpar.optimisers_config import AdamW, Constant
    from jaxpar.parallel.mesh import MeshConfig, make_mesh
    from jaxpar.presets import llama
    from jaxpar.program import build
    from jaxpar.step import Batch, chain
    from jaxpar.steps.base import make_step
    from jaxpar.steps.clip import clip_global

    on_cpu = jax.default_backend() == "cpu"
    cfg = llama(
        size.layers,
        size.width,
        size.heads,
        hidden=size.hidden,
        vocabulary=size.vocabulary,
        context=size.length,
        dtype=dtype,
        layer_loop="unroll" if on_cpu else "scan",
        remat="none" if on_cpu else "dots",
    )
    program = build(cfg, make_mesh(MeshConfig(), jax.devices()[:1]), rows=size.rows)
    tx = make(AdamW(schedule=Constant(1e-4)), program.specs, steps=10_000)
    step = chain(make_step(program.grad_fn, tx), clip_global(1.0))
    state = jax.jit(step.init)(program.init(jax.random.key(0)), jax.random.key(1))
    shape = (size.rows, size.length)
    tokens = jax.random.randint(jax.random.key(2), shape, 0, size.vocabulary)
    at = jnp.broadcast_to(jnp.arange(size.length), shape)
    ones = jnp.ones(shape, jnp.int32)
    batch = Batch(tokens, jnp.roll(tokens, -1, 1), jnp.ones(shape), at, ones, jnp.arange(size.rows))
    update = jax.jit(step.update, donate_argnums=0)
    box = [state]

    def run() -> float:
        box[0], metrics = update(box[0], batch)
        return float(metrics["loss"])

    return run, flops.training(cfg, size.length)


def torch_step(size: Size, dtype: str, compiled: bool):
    """The same of `transformers`' Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=size.width,
            intermediate_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            vocab_size=size.vocabulary,
            max_position_embeddings=size.length,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
        )
    ).to(device)
    forward = torch.compile(model) if compiled else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, size.vocabulary, (size.rows, size.length), device=device)

    def run() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.item()

    return run, None


PLAIN = "plain malloc"
"""jaxpar without `host_memory.settle`, on a CPU."""

CONTENDERS = {
    "jaxpar": jaxpar_step,
    PLAIN: jaxpar_step,
    "torch eager": lambda size, dtype: torch_step(size, dtype, compiled=False),
    "torch compile": lambda size, dtype: torch_step(size, dtype, compiled=True),
}
RIVALS = tuple(name for name in CONTENDERS if name.startswith("torch"))


def worker(name: str, size: Size, dtype: str, pipe) -> None:
    """A contender's process: a step for each message, and the seconds back."""
    try:
        if name == "jaxpar":
            host_memory.settle()  # as every run of jaxpar does
        run, flops = CONTENDERS[name](size, dtype)
        first = time.perf_counter()
        run()
        first = time.perf_counter() - first
        run()
        pipe.send({"first_step_s": first, "flops_per_token": flops})
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
        return
    while pipe.recv():
        start = time.perf_counter()
        run()
        pipe.send(time.perf_counter() - start)
    pipe.send(peak_bytes(name))


def peak_bytes(name: str) -> int:
    """Peak memory: of the device where it has memory of its own, else of the process."""
    if not name.startswith("torch"):
        import jax

        if stats := jax.local_devices()[0].memory_stats():
            return stats["peak_bytes_in_use"]
    else:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compare(size: Size, dtype: str, names: list[str], rounds: int) -> dict:
    """All contenders on one size, in rounds."""
    context = multiprocessing.get_context("spawn")
    pipes, found = {}, {}
    for name in names:
        ours, theirs = context.Pipe()
        process = context.Process(target=worker, args=(name, size, dtype, theirs), daemon=True)
        process.start()
        # One after the other: compiling beside another's compilation would only slow both.
        found[name] = ours.recv()
        if "error" not in found[name]:
            pipes[name] = (ours, process)
    seconds = {name: [] for name in pipes}
    for _ in range(rounds):
        for name, (pipe, _) in pipes.items():
            time.sleep(0.25)  # the threads of the one before spin a while before they sleep
            pipe.send(True)
            seconds[name].append(pipe.recv())
    for name, (pipe, process) in pipes.items():
        pipe.send(False)
        found[name]["peak_bytes"] = pipe.recv()
        process.join()
    tokens = size.rows * size.length
    for name in pipes:
        found[name]["tokens_per_second"] = tokens / statistics.median(seconds[name])
        found[name]["seconds"] = seconds[name]
        for other in pipes:
            if other != name == "jaxpar":
                ratios = [b / a for a, b in zip(seconds[name], seconds[other], strict=True)]
                found[name][f"ratio to {other}"] = statistics.median(ratios)
    return {"size": asdict(size), "dtype": dtype, "rounds": rounds, "contenders": found}


def describe() -> dict:
    """What a figure is worth nothing without."""
    import jax

    names = ("jaxpar", "jax", "jaxlib", "torch", "transformers")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "platform": device.platform,
        "chip": device.device_kind if device.platform != "cpu" else platform.processor() or platform.machine(),
        "cores": multiprocessing.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "command": shlex.join(["python", "-m", "jaxpar.experiments.bench.train_step", *sys.argv[1:]]),
    }


def table(results: list[dict], peak: float | None, head: bool = True) -> str:
    names = f"{'size':<8}{'dtype':<10}{'contender':<15}{'tokens/s':>10}{'peak MB':>9}{'MFU':>7}{'ratio':>7}"
    lines = [names] if head else []
    for result in results:
        for name, f in result["contenders"].items():
            row = f"{result['size']['name']:<8}{result['dtype']:<10}{name:<15}"
            if "error" in f:
                lines.append(f"{row}{'not measured: ' + f['error']}")
                continue
            flops = result["contenders"]["jaxpar"].get("flops_per_token")
            mfu = f"{f['tokens_per_second'] * flops / peak:7.1%}" if peak and flops else f"{'-':>7}"
            ratios = [v for k, v in f.items() if k.startswith("ratio to torch")]
            ratio = f"{min(ratios):7.2f}" if ratios else f"{'-':>7}"
            lines.append(f"{row}{f['tokens_per_second']:>10,.0f}{f['peak_bytes'] / 1e6:>9,.0f}{mfu}{ratio}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small size without PyTorch")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each contender that are counted")
    parser.add_argument("--sizes", nargs="*", help="of small, medium, large")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=RIVALS, help="which of PyTorch's")
    parser.add_argument("--plain-malloc", action="store_true", help="also jaxpar without its setting of the allocator")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    options = parser.parse_args(argv)
    # Contenders share a GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from jaxpar import flops

    about = describe()
    gpu = about["platform"] == "gpu"
    sizes = [QUICK] if options.quick else [BILLION] if gpu else list(SIZES)
    if options.sizes:
        sizes = [s for s in sizes if s.name in options.sizes]
    dtypes = ["float32"] if options.quick else ["bfloat16"] if gpu else options.dtypes
    with_torch = about["versions"]["torch"] is not None and not options.quick
    names = [
        "jaxpar",
        *[PLAIN] * options.plain_malloc,
        *[name for name in options.rivals if with_torch],
    ]
    peak, results = flops.peak(jax.devices()[0].device_kind), []
    for size in sizes:
        for dtype in dtypes:
            results.append(compare(size, dtype, names, 3 if options.quick else options.rounds))
            # A long run that is cut keeps what it has measured.
            print(table(results[-1:], peak, head=len(results) == 1), flush=True)
    print("ratio: jaxpar's speed over the faster PyTorch's, median over rounds; above 1 jaxpar is faster")
    if not with_torch and not options.quick:
        print("PyTorch not measured: pip install 'jaxpar[bench]'")
    out = options.out or (None if options.quick else RESULTS / f"train_step_{about['platform']}.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**about, "results": results}, indent=1))
        print(f"raw figures: {out}")
    return results


if __name__ == "__main__":
    main()
