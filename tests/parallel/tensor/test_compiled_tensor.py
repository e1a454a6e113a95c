"""What a compiled training step holds for each form of products: what its layers send, and on how many tokens they work.

The truth is XLA's text of loss and gradients on four fake devices, its loop over the layers told by the times that it runs.
"""

import math
import re
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import pytest

from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.parallel.collectives import OPS, count
from jaxpar.parallel.explain import explain
from jaxpar.parallel.hlo import parse
from jaxpar.parallel.mesh import MeshConfig, make_mesh
from jaxpar.parallel.rules import Rules
from jaxpar.parallel.tensor.config import TensorConfig
from jaxpar.program import build
from jaxpar.step import Batch

MESH = MeshConfig(tensor=4)
B, T, t = 4, 16, 4
S, CHUNK = T // t, 2
# Every size is another one, and the loops over layers (3) and chunks of the loss (2, or 8 where all tokens are here) too.
CFG = ModelConfig(
    vocabulary=88, layers=3, width=24, heads=4, kv_heads=4, head_size=10, hidden=40, loss_chunk=CHUNK, remat="none"
)
WHOLE = B * T * CFG.width * 4
"""Bytes of the stream of all tokens, [B, T, D]."""


def compiled(products: str, gradients: bool = True, mesh: MeshConfig = MESH, rows: int = B) -> str:
    """The loss, with its gradients or alone."""
    used = make_mesh(mesh, jax.devices()[: math.prod(mesh.sizes.values())])
    program = build(CFG, used, rows=rows, length=T, tensor=TensorConfig(products))
    param = lambda s, place: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=place)
    params = jax.tree.map(param, program.specs, program.param_shardings, is_leaf=lambda x: hasattr(x, "axes"))
    ids, row = jax.ShapeDtypeStruct((rows, T), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    batch = Batch(ids, ids, jax.ShapeDtypeStruct((rows, T), jnp.float32), ids, ids, row)
    run = (lambda params, batch: program.grad_fn(params, batch, None, None)) if gradients else program.eval_fn
    return jax.jit(run).lower(params, batch).compile().as_text()


text = cache(compiled)


def in_layers(products: str) -> list:
    """What one layer sends, forward and backward."""
    return [c for c in count(text(products), MESH.sizes).collectives if c.times == CFG.layers]


def sent(products: str) -> dict[str, dict[str, int]]:
    """How many collectives of each kind a layer has."""
    which = lambda c: "backward" if "transpose" in c.where else "forward"
    found = {"forward": Counter(), "backward": Counter()}
    for c in in_layers(products):
        found[which(c)][c.op] += 1
    return {which: dict(ops) for which, ops in found.items()}


def test_gathered_is_gathers_and_scatters_alone(devices):
    """Two branches: one gather and one scatter each; backward the gather of a branch's gradient, that of its tokens once
    more, and the scatter of theirs. No sum of an activation is an all-reduce."""
    assert sent("gathered") == {
        "forward": {"all-gather": 2, "reduce-scatter": 2},
        "backward": {"all-gather": 4, "reduce-scatter": 2},
    }
    assert {c.nbytes for c in in_layers("gathered")} == {WHOLE}


def test_a_ring_is_permutes_alone(devices):
    """Two rings of t - 1 hops in each of two branches, and three of each backward; a hop is one device's tokens."""
    assert sent("ring") == {
        "forward": {"collective-permute": 4 * (t - 1)},
        "backward": {"collective-permute": 6 * (t - 1)},
    }
    assert {c.nbytes for c in in_layers("ring")} == {WHOLE // t}


def test_halves_send_what_the_whole_sends(devices):
    twice = lambda ops: {op: 2 * n for op, n in ops.items()}
    assert sent("weave") == {which: twice(ops) for which, ops in sent("gathered").items()}
    assert {c.nbytes for c in in_layers("weave")} == {WHOLE // 2}


def test_whole_is_one_all_reduce_a_branch(devices):
    """Of all tokens; and what the partitioner makes of `sharded` on CPU, where no pass joins an all-reduce and a slice
    into a reduce-scatter: tokens are spread between branches, at the bytes of an all-reduce and a gather."""
    assert sent("whole")["forward"] == {"all-reduce": 2}
    assert sent("sharded")["forward"] == {"all-reduce": 2, "all-gather": 2}


@pytest.mark.parametrize(
    ("products", "tokens"), [("whole", T), ("sharded", S), ("gathered", S), ("ring", S), ("weave", S)]
)
def test_norms_work_on_a_share_of_the_tokens(products, tokens, devices):
    """One reciprocal square root a token of a device, two rows at a time where they go in two halves."""
    found = set()
    for body in parse(text(products)).computations.values():
        for one in body:
            if one.opcode == "rsqrt":
                found.add(math.prod(int(n) for n in re.match(r"f32\[([\d,]+)\]", one.shape)[1].split(",")))
    assert found == {tokens * (B // 2 if products == "weave" else B)}


@pytest.mark.parametrize("products", ["whole", "sharded", "gathered", "ring", "weave"])
def test_no_device_has_the_whole_vocabulary(products, devices):
    """Neither a table of it, nor logits: a chunk's are for a quarter of the ids."""
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\d+\[([\d,]+)\]", text(products))}
    assert any(shape[-1] == CFG.vocabulary // t and len(shape) == 3 for shape in shapes)
    assert not [shape for shape in shapes if CFG.vocabulary in shape]


def chains(hlo: str) -> list[list[list[str]]]:
    """Of each pass over the layers: its collectives in groups that do not meet.

    Two belong to one group where the data of one come from the other's, through whatever lies between.
    """
    module = parse(hlo)
    bodies = [run.body for run in module.runs()[0] if run.times == CFG.layers]
    found = []
    for body in bodies:
        behind, groups = {}, []
        for one in body:
            before = set().union(*(behind.get(name, set()) for name in one.operands)) if one.operands else set()
            if any(inside.opcode.removesuffix("-start") in OPS for inside in module.fused(one)):
                joined = [group for group in groups if before & group]
                groups = [group for group in groups if not before & group] + [{one.name}.union(*joined)]
                before = before | {one.name}
            behind[one.name] = before
        if groups:
            ops = {one.name: one.opcode for one in body}
            found.append([sorted(ops[name] for name in group) for group in groups])
    return found


FORWARD = ["all-gather"] * 2 + ["reduce-scatter"] * 2
AGAIN = [["all-gather"]] * 2
"""A branch's tokens, gathered once more backward: they wait for nothing, and only gradients of weights wait for them."""


def test_halves_do_not_wait_for_each_other(devices):
    """Within a layer, forward and backward: two chains of collectives without a dependence between them."""
    assert sorted(chains(text("weave"))) == sorted([[FORWARD] * 2, [*AGAIN, *AGAIN, FORWARD, FORWARD]])
    assert sorted(chains(text("gathered"))) == sorted([[FORWARD], [*AGAIN, FORWARD]])


def test_halves_that_meet_are_found(devices, monkeypatch):
    """The same forward pass where the second half takes a trace of what the first one made: one chain."""
    block, held = decoder.layers.block, []

    def meeting(cfg, params, state, *rest):
        first = held.pop() if held else None
        new, pages = block(cfg, params, state if first is None else state + 1e-30 * first, *rest)
        if first is None:
            held.append(new)
        return new, pages

    monkeypatch.setattr(decoder.layers, "block", meeting)
    assert chains(compiled("weave", gradients=False)) == [[sorted(FORWARD * 2)]]


@pytest.mark.parametrize("products", ["ring", "weave"])
def test_rows_and_weights_stay_apart(products, devices):
    """With data and fsdp: no row leaves its device, weights are gathered a layer at a time, forward and backward, their
    gradients scattered there and summed over data once; all of it to the byte what `explain` says."""
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    found = count(compiled(products, mesh=mesh, rows=8), mesh.sizes).collectives
    assert {c.op for c in found if "data" in c.axes} == {"all-reduce"}

    total = lambda ones: {key: sum(n for k, n in ones if k == key) for key in {k for k, _ in ones}}
    record = explain(decoder.spec(CFG), mesh, Rules(), rows=8, length=T, tensor=TensorConfig(products)).record
    said = [c for row in record["parameters"] if row["name"].startswith("layers/") for c in row["collectives"]]
    said += [c for c in record["activations"] if "layers/" in c["where"]]
    said = [((c["op"], tuple(c["axes"])), c["bytes"] * c["times"]) for c in said if c["op"] != "all-reduce"]
    layers = [((c.op, c.axes), c.nbytes * c.times) for c in found if c.times == CFG.layers]
    assert total(layers) == total(said)

    sums = [c for row in record["parameters"] for c in row["collectives"] if c["op"] == "all-reduce"]
    said = total([(tuple(c["axes"]), c["bytes"] * c["times"]) for c in sums])
    once = total([(c.axes, c.nbytes) for c in found if c.op == "all-reduce" and "data" in c.axes])
    once["data", "fsdp", "tensor"] -= 2 * 4  # the sums of losses and of weights
    assert once == said
