"""The Hopper attention kernels compiled for an H200, on a machine without one. `.ci/aot` runs this where the compiler is."""

import json
import math
import re
import sys
from pathlib import Path

import pytest

from jaxpar.pallas_kernels import gpu
from tests.pallas_kernels import cuda_target
from tests.processes import start

CALLS = ((64, "float16", True, 4), (128, "bfloat16", True, 1), (128, "bfloat16", False, 4), (256, "bfloat16", True, 4))
"""Head size, dtype, whether the call has all that a mask has and a soft cap, or is causal only, and how many query heads share
keys: each row of the block table, at its largest."""
SPILLS = {64: 0, 128: 256, 256: 144} if gpu.MAY_ADD else {64: 0, 128: 0, 256: 128}
"""Bytes by head size, at most. With 128 in one kernel, and with 256, the backward pass has too many addresses beside its sums:
most are read again once a step."""
QUERIES, HEADS = 4096, 8


def scanned() -> tuple[int, int]:
    """`Compiled.in_place` of the gradient of three layers in a loop, which slices what the layers keep."""
    import jax
    import jax.numpy as jnp

    from jaxpar.pallas_kernels.attention import MaskSpec, attention

    def total(q, k):
        layer = lambda q, _: (attention(q, k, k, mask=MaskSpec(), scale=0.1, implementation="mosaic_gpu"), None)
        return jnp.sum(jax.lax.scan(layer, q, None, length=3)[0].astype(jnp.float32))

    x = jax.ShapeDtypeStruct((1, 256, 1, 64), "bfloat16")
    return cuda_target.compiled(jax.grad(total), x, x).in_place()


def compiled() -> list[dict]:
    """Forward and backward of each call: what the compiler says of each kernel, and how much memory the program takes."""
    import jax

    from jaxpar.pallas_kernels.attention import MaskSpec, attention

    def both(full, q, k, v, d_out, d_lse, segments, window):
        mask = MaskSpec(window=window, q_segments=segments, k_segments=segments) if full else MaskSpec()
        cap = 20.0 if full else None
        call = lambda q, k, v: attention(
            q, k, v, mask=mask, scale=0.1, cap=cap, lse_out=True, implementation="mosaic_gpu"
        )
        outs, back = jax.vjp(call, q, k, v)
        return *outs, *back((d_out, d_lse))

    found = []
    for size, dtype, full, shared in CALLS:
        q, k = (jax.ShapeDtypeStruct((1, QUERIES, heads, size), dtype) for heads in (HEADS, HEADS // shared))
        more = ((1, HEADS, QUERIES), "float32"), ((1, QUERIES), "int32"), ((), "int32")
        program = cuda_target.compiled(
            lambda *x, full=full: both(full, *x), q, k, k, q, *(jax.ShapeDtypeStruct(*each) for each in more)
        )
        kernels = {
            one.name: {
                "target": one.target,
                "products": sorted(one.products),
                "copies": one.ptx.count("cp.async.bulk.tensor"),
                "registers": one.registers,
                "spills": one.spills,
                "shared": one.shared,
            }
            for one in program.kernels
        }
        found.append(
            {
                "size": size,
                "dtype": dtype,
                "full": full,
                "shared": shared,
                "kernels": kernels,
                "temp": program.temp_bytes,
            }
        )
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    file = tmp_path_factory.mktemp("aot") / "found.json"
    run = start(["-m", "tests.pallas_kernels.test_attention_cuda_aot", str(file)], **cuda_target.environment())
    assert run.wait(600) == 0, run.output
    return json.loads(file.read_text())


@cuda_target.needs_compiler
@pytest.mark.skipif(not gpu.MAY_ADD, reason="before JAX 0.11 no kernel adds to an array")
def test_in_a_loop_over_layers_the_kernel_that_adds_to_dq_is_in_no_fusion(made):
    """One with a slice beside it gives dq a place of its own, and leaves there what was in memory."""
    assert made["scanned"] == [1, 0]


@cuda_target.needs_compiler
def test_every_row_of_the_table_compiles_into_registers_and_holds_no_logits(made):
    found = made["calls"]
    assert tuple((row["size"], row["dtype"], row["full"], row["shared"]) for row in found) == CALLS
    for row in found:
        size, short = row["size"], {"bfloat16": "bf16", "float16": "f16"}[row["dtype"]]
        product = lambda columns, short=short: f"m64n{columns}k16.f32.{short}.{short}"
        single = gpu.MAY_ADD and (size == 64 or (size == 128 and row["shared"] == 1))
        if size == 256:
            kernels = ["forward_out_lse", "backward_q_dq", "backward_k_dk", "backward_k_dv"]
        else:
            kernels = [
                "forward_out_lse",
                *(["backward_dk_dv"] if single else ["backward_q_dq", "backward_k_dk_dv"]),
            ]
        assert len(row["kernels"]) == len(kernels)
        for kernel in kernels:
            (made,) = (one for name, one in row["kernels"].items() if re.fullmatch(rf"attention_{kernel}_\d+", name))
            # Logits of 64 queries and the table's keys, or of keys and queries, and sums over the head size.
            logits = 128 if kernel.startswith("forward") and size <= 128 else 64
            columns = {logits, size, size // 2} if kernel == "backward_dk_dv" else {logits, size}
            assert made["products"] == sorted(map(product, columns)), (kernel, row)
        for kernel in row["kernels"].values():
            assert kernel["target"] == "sm_90a"
            assert kernel["copies"] > 0
            assert kernel["spills"] <= SPILLS[size], row
            # At the launch every thread of three warpgroups has as many as there are.
            assert kernel["registers"] == 168
            assert kernel["shared"] <= cuda_target.SHARED_BYTES
        # Beside its arguments and results, and dq in float32 where one kernel adds to it, the program has a few numbers a
        # query: no array of queries by keys, of however few bits.
        added = 4 * size * HEADS * QUERIES if single else 0
        assert row["temp"] - added < 32 * HEADS * QUERIES < math.prod((HEADS, QUERIES, QUERIES)) / 8, row


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({"calls": compiled(), "scanned": scanned()}))
