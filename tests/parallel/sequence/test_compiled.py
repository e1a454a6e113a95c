"""What the compiled programs contain: which collectives, how many bytes, and none of them under a condition."""

import re
from collections import Counter

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from sharded import draw, score

from jaxpar.pallas_kernels.attention import MaskSpec
from jaxpar.parallel.collectives import count
from jaxpar.parallel.sequence.api import sequence_attention
from jaxpar.parallel.sequence.choose import KINDS, RINGS, Workload, bytes_per_link

N, B, T, H, G, K = 4, 1, 16, 4, 1, 8
WORK = Workload(length=T, heads=H, kv_heads=G, head_size=K, devices=N, itemsize=4, batch=B)


def traced(devices, kind, *, gradients: bool):
    sizes = {"ring": 2, "ulysses": 2} if kind == "hybrid" else {"sequence": N}
    mesh = Mesh(np.asarray(devices[:N]).reshape(tuple(sizes.values())), tuple(sizes))
    axis = tuple(sizes) if kind == "hybrid" else "sequence"
    attention = sequence_attention(mesh, kind=kind, axis=axis)
    f = lambda q, k, v: attention(q, k, v, mask=MaskSpec(), scale=1.0, lse_out=True)
    q, k, v, *weights = draw(T, B=B, H=H, G=G, K=K)
    return (score(f, *weights) if gradients else jax.jit(f)).trace(q, k, v), sizes


def compiled(devices, kind):
    """`(text, {op: bytes that a device sends})` of the forward pass."""
    program, sizes = traced(devices, kind, gradients=False)
    text = program.lower().compile().as_text()
    return text, sent_by(text, sizes)


def sent_by(text: str, sizes) -> dict[str, int]:
    found = count(text, sizes)
    assert found.unknown_loops == 0
    sent = Counter()
    for c in found.collectives:
        sent[c.op] += c.sent * c.times
    return dict(sent)


@pytest.mark.quick
@pytest.mark.parametrize("kind", RINGS)
def test_rings_permute_and_gather_nothing(devices, kind):
    """Bytes as `choose` states: neither more hops nor wider ones."""
    _, sent = compiled(devices, kind)
    assert sent == {"collective-permute": bytes_per_link(kind, WORK).total}


@pytest.mark.parametrize("kind", ["ring", "ring_bidirectional"])
def test_the_backward_ring_too(devices, kind):
    """By itself, from what is kept: nothing of other devices."""
    mesh = Mesh(np.asarray(devices[:N]), ("sequence",))
    attention = sequence_attention(mesh, kind=kind)
    q, k, v, weights, _ = draw(T, B=B, H=H, G=G, K=K)
    f = lambda q, k, v: attention(q, k, v, mask=MaskSpec(), scale=1.0)
    _, pull = jax.vjp(jax.jit(f), q, k, v)
    kept = {x.shape for x in jax.tree.leaves(pull) if x.ndim}
    assert kept <= {q.shape, k.shape, (B, H, T)}, kept
    text = jax.jit(lambda pull, d_out: pull(d_out)).lower(pull, weights).compile().as_text()
    traffic = bytes_per_link(kind, WORK, backward=True)
    assert sent_by(text, {"sequence": N}) == {"collective-permute": traffic.total}
    ways = hops(text)
    assert set(ways) == ({1} if kind == "ring" else {1, N - 1})
    assert ways[N - 1] == (0 if traffic.down == 0 else ways[1])


def test_forward_and_backward_hops_stay_apart(devices):
    """A barrier, without which the first hop of both is one, and a neighbour's keys are kept in between."""
    program, _ = traced(devices, "ring", gradients=True)
    assert "optimization_barrier" in program.lower().as_text()


@pytest.mark.quick
def test_ulysses_exchanges_heads(devices):
    _, sent = compiled(devices, "ulysses")
    assert sent == {"all-to-all": bytes_per_link("ulysses", WORK).total}


def test_the_hybrid_has_both(devices):
    _, sent = compiled(devices, "hybrid")
    exchange = Workload(length=T // 2, heads=H, kv_heads=G, head_size=K, devices=2, itemsize=4)
    ring = Workload(length=T, heads=H // 2, kv_heads=1, head_size=K, devices=2, itemsize=4)
    assert sent == {
        "all-to-all": bytes_per_link("ulysses", exchange).total,
        "collective-permute": bytes_per_link("ring", ring).total,
    }


def hops(text: str) -> Counter:
    """How far the data of each permute goes up the ring, for payloads other than the log-sum-exps."""
    found = Counter()
    for line in text.splitlines():
        if pairs := re.search(r"= \(?f32\[([\d,]+)\].* collective-permute(?:-start)?\(.*pairs=\{\{(\d+),(\d+)\}", line):
            shape, source, target = pairs.groups()
            if shape.endswith(f",{K}"):
                found[(int(target) - int(source)) % N] += 1
    return found


def test_which_way_the_data_goes(devices):
    """TokenRing: queries up 3 times; outputs back 1, 2 and 3 hops (3 back is 1 up). Both ways: half each."""
    assert hops(compiled(devices, "tokenring")[0]) == {1: N - 1 + 1, 2: 1, 3: 1}
    found = hops(compiled(devices, "ring_bidirectional")[0])
    assert set(found) == {1, N - 1}
    assert found[1] == found[N - 1]


def inside_conditions(jaxpr, inside=False):
    """Names of the primitives under a condition, at any depth."""
    for eqn in jaxpr.eqns:
        if inside:
            yield eqn.primitive.name
        for value in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from inside_conditions(inner, inside or eqn.primitive.name == "cond")


@pytest.mark.quick
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ulysses"])
def test_no_collective_under_a_condition(devices, kind):
    """It would be silently wrong: the devices do not agree on the condition."""
    program, _ = traced(devices, kind, gradients=True)
    found = set(inside_conditions(program.jaxpr.jaxpr))
    assert "dot_general" in found
    collectives = ("ppermute", "all_to_all", "all_gather", "psum", "pmin", "pmax", "reduce_scatter")
    assert not {name for name in found if name.startswith(collectives)}
