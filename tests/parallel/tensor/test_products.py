"""Column and row products over fake devices, beside one matmul in float64: values, gradients, and what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpar.models.context import matmul
from jaxpar.parallel.collectives import count
from jaxpar.parallel.pipeline.branches import inner_jaxprs
from jaxpar.parallel.pipeline.jaxprs import is_variable
from jaxpar.parallel.tensor.by_hand import ByHand

B, T, D, H, K = 2, 8, 6, 4, 3
FORMS = {"gathered": False, "ring": True}


def branch(columns, row):
    """Three column products of different shapes that read the same tokens, and a row product over two dimensions."""

    def run(x, wq, wk, wv, wo):
        q, k, v = columns(x, [wq, wk, wv])
        return row(jnp.tanh(q) * k[..., None] + v, wo, 2)

    return run


def by_hand(form: str, devices, t: int):
    hand = ByHand(t, rings=FORMS[form])
    mesh = Mesh(np.asarray(devices[:t]), ("tensor",))
    local = branch(lambda x, ks: hand.columns(matmul, x, ks), lambda h, k, n: hand.row(matmul, h, k, n))
    tokens, over = P(None, "tensor"), P(None, "tensor")
    return jax.shard_map(local, mesh=mesh, in_specs=(tokens, over, over, over, P("tensor")), out_specs=tokens)


def draw(dtype):
    rng = np.random.default_rng(0)
    shapes = (B, T, D), (D, H, K), (D, H), (D, H, K), (H, K, D), (B, T, D)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def score(f):
    """Value and gradients of a scalar without symmetries; the last argument weighs the outputs."""
    total = lambda weights, *inputs: jnp.sum(f(*inputs) * weights)
    return jax.jit(jax.value_and_grad(total, argnums=(1, 2, 3, 4, 5)))


@pytest.mark.quick
@pytest.mark.parametrize("t", [2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_products_and_gradients_are_those_of_one_matmul(form, t, devices):
    with jax.enable_x64(True):
        *inputs, weights = draw(np.float64)
        plain = branch(lambda x, ks: [matmul(x, k) for k in ks], matmul)
        expected = score(plain)(weights, *inputs)
        found = score(by_hand(form, devices, t))(weights, *inputs)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [2, 4])
def test_sums_of_a_ring_are_not_rounded_on_their_way(t, devices):
    """In bfloat16: a row product is the float32 sum over all devices, rounded once, whatever the number of devices."""
    rng = np.random.default_rng(1)
    h = jnp.asarray(rng.standard_normal((1, 8, 64)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((64, 16)), jnp.bfloat16)
    mesh = Mesh(np.asarray(devices[:t]), ("tensor",))
    local = lambda h, w: ByHand(t, rings=True).row(matmul, h, w, 1)
    run = jax.shard_map(local, mesh=mesh, in_specs=(P(None, None, "tensor"), P("tensor")), out_specs=P(None, "tensor"))
    exact = np.einsum("btf,fd->btd", *(np.asarray(x, np.float64) for x in (h, w)))
    found = np.asarray(jax.jit(run)(h, w), np.float64)
    # Half a unit in the last of bfloat16's 8 bits, and float32's own error.
    assert np.all(np.abs(found - exact) <= 2.0**-8 * np.abs(exact) * (1 + 1e-3) + 1e-4)


@pytest.mark.quick
@pytest.mark.parametrize("form", FORMS)
def test_a_device_keeps_its_own_tokens(form, devices):
    """Of the tokens before the column products: S of T, not what was gathered."""
    t = 4
    inputs = draw(np.float32)[:-1]
    _, pull = jax.vjp(jax.jit(by_hand(form, devices, t)), *inputs)
    widths = {x.shape for x in jax.tree.leaves(pull) if x.ndim == 3 and x.shape[-1] == D and x.shape[0] == B}
    # Global shapes: [B, T, D] over the tokens is S of a device; gathered tokens would be [B, t·T, D].
    assert widths == {(B, T, D)}


def ops_of(f, *args, t) -> dict[str, int]:
    found = count(jax.jit(f).lower(*args).compile().as_text(), {"tensor": t})
    return {op: sum(c.op == op for c in found.collectives) for op in {c.op for c in found.collectives}}


@pytest.mark.quick
def test_what_the_forward_pass_sends(devices):
    """One gather for the three column products and a scatter, or t - 1 hops for each of the two."""
    t = 4
    inputs = draw(np.float32)[:-1]
    assert ops_of(by_hand("gathered", devices, t), *inputs, t=t) == {"all-gather": 1, "reduce-scatter": 1}
    assert ops_of(by_hand("ring", devices, t), *inputs, t=t) == {"collective-permute": 2 * (t - 1)}


@pytest.mark.quick
def test_what_the_backward_pass_sends(devices):
    """By itself: a gather of the outputs' gradients, one of the tokens again, a scatter. Three rings likewise."""
    t = 4
    *inputs, weights = draw(np.float32)
    for form, expected in (
        ("gathered", {"all-gather": 2, "reduce-scatter": 1}),
        ("ring", {"collective-permute": 3 * (t - 1)}),
    ):
        _, pull = jax.vjp(jax.jit(by_hand(form, devices, t)), *inputs)
        assert ops_of(lambda pull, d: pull(d), pull, weights, t=t) == expected


@pytest.mark.quick
def test_hops_do_not_wait_for_products(devices):
    """In a ring, what a step sends on was there before the step's product: no permute of the tokens depends on one, and
    of the travelling sums each waits for its own step's product alone."""
    t = 4
    x, *kernels = draw(np.float32)[:5]
    jaxpr = jax.make_jaxpr(by_hand("ring", devices, t))(x, *kernels)
    (shard,) = [e for e in jaxpr.eqns if e.primitive.name == "shard_map"]
    hops = []

    def walk(jaxpr, given):
        """The products behind each result, when there are those behind each input."""
        known = dict(zip(jaxpr.invars, given, strict=True))
        of = lambda v: known.get(v, frozenset()) if is_variable(v) else frozenset()
        for eqn in jaxpr.eqns:
            inner = list(inner_jaxprs(eqn))
            before = frozenset().union(*map(of, eqn.invars))
            if inner:
                results = walk(inner[0], map(of, eqn.invars))
            else:
                results = [before | {id(eqn)} if eqn.primitive.name == "dot_general" else before] * len(eqn.outvars)
            if eqn.primitive.name == "ppermute":
                hops.append(len(before))
            known.update(zip(eqn.outvars, results, strict=True))
        return list(map(of, jaxpr.outvars))

    inner = shard.params["jaxpr"]
    walk(inner, [frozenset()] * len(inner.invars))
    tokens, sums = hops[: t - 1], hops[t - 1 :]
    assert tokens == [0] * (t - 1)
    # Behind each sum stand the column products (3 a step, t steps) and one row product more a hop.
    assert sums == [3 * t + j for j in range(1, t)]
