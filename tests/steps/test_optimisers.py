"""Optimisers: like optax's on plain trees and torch's, one state for each layer, matrices for Muon, schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpar.errors import UserError
from jaxpar.models.spec import Normal, ParamSpec, init
from jaxpar.optimisers import make, schedule
from jaxpar.optimisers_config import (
    SGD,
    Adafactor,
    AdamW,
    Constant,
    Lion,
    Muon,
    WarmupCosine,
    WarmupLinear,
    WarmupStableDecay,
)
from jaxpar.state import state_specs
from tests.steps.tiny import assert_bitwise, numbers

N = Normal(0.5)
SPECS = {
    "embedding": {"tokens": ParamSpec((10, 4), ("vocabulary", "embed"), N)},
    "layers": {
        "query": {"kernel": ParamSpec((3, 4, 2, 3), ("layers", "embed", "heads", "head_size"), N)},
        "out": {
            "kernel": ParamSpec((3, 2, 3, 4), ("layers", "heads", "head_size", "embed"), N),
            "bias": ParamSpec((3, 4), ("layers", "embed"), N, decay=False),
        },
        "norm": {"scale": ParamSpec((3, 4), ("layers", "norm"), N, decay=False)},
    },
    "head": {"norm": {"scale": ParamSpec((4,), ("norm",), N, decay=False)}},
}
RATE = Constant(0.01)
ALL = {
    "adamw": AdamW(RATE),
    "lion": Lion(RATE),
    "muon": Muon(RATE),
    "adafactor": Adafactor(RATE, smallest=2, weight_decay=0.1),
    "sgd": SGD(RATE, weight_decay=0.1),
}
each = pytest.mark.parametrize("name", ALL)


def params():
    return init(SPECS, jax.random.key(0))


def gradients(i, like=None):
    return jax.tree.map(
        lambda p: jnp.asarray(np.random.default_rng(i).normal(size=p.shape), p.dtype),
        params() if like is None else like,
    )


def descend(tx, p, grads):
    state, update = tx.init(p), jax.jit(tx.update)
    for g in grads:
        u, state = update(g, state, p)
        p = optax.apply_updates(p, u)
    return p, state


def close(a, b, rtol=1e-6, atol=1e-7):
    for x, y in zip(jax.tree.leaves(numbers(a)), jax.tree.leaves(numbers(b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def decays(tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("bias", "scale"), tree)


@pytest.mark.quick
def test_adamw_is_optax_on_the_unstacked_tree():
    config = AdamW(WarmupLinear(0.01, 2, 0.1))
    grads = [gradients(i) for i in range(5)]
    found, _ = descend(make(config, SPECS, steps=6), params(), grads)
    unstack = lambda t: {**t, "layers": [jax.tree.map(lambda x, i=i: x[i], t["layers"]) for i in range(3)]}
    plain = unstack(params())
    rates = [0.005, 0.01, 0.01, 0.01 - 0.009 / 4, 0.01 - 2 * 0.009 / 4]
    rate = lambda count: jnp.asarray(rates)[count]
    tx = optax.adamw(rate, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=decays(plain))
    expected, _ = descend(tx, plain, [unstack(g) for g in grads])
    close(unstack(found), expected)


def test_adamw_is_torchs():
    torch = pytest.importorskip("torch")
    config = AdamW(WarmupCosine(0.01, 2, 0.1))
    grads = [gradients(i) for i in range(5)]
    found, _ = descend(make(config, SPECS, steps=5), params(), grads)
    leaves = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in jax.tree.leaves(params())]
    decayed = jax.tree.leaves(decays(params()))
    groups = [
        {"params": [p for p, d in zip(leaves, decayed, strict=True) if d == on], "weight_decay": 0.1 * on}
        for on in (True, False)
    ]
    optimiser = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    cosine = [0.1 + 0.45 * (1 + np.cos(np.pi * i / 3)) for i in range(3)]
    for g, factor in zip(grads, [0.5, 1.0, *cosine], strict=True):
        for group in optimiser.param_groups:
            group["lr"] = 0.01 * factor
        for p, x in zip(leaves, jax.tree.leaves(g), strict=True):
            p.grad = torch.tensor(np.asarray(x))
        optimiser.step()
    close(jax.tree.leaves(found), [p.detach().numpy() for p in leaves], rtol=1e-6, atol=1e-6)


@pytest.mark.quick
@each
def test_each_layer_has_its_own_state(name):
    """Layer i of the stack goes on exactly as in a model that has only this layer."""
    grads = [gradients(i) for i in range(3)]
    whole, state = descend(make(ALL[name], SPECS, steps=5), params(), grads)
    counts = [x for path, x in jax.tree_util.tree_flatten_with_path(state.stacked)[0] if "count" in str(path[-1])]
    assert counts or name == "sgd"
    assert all(x.shape == (3,) for x in counts)
    one = {
        **SPECS,
        "layers": jax.tree.map(
            lambda s: ParamSpec((1, *s.shape[1:]), s.axes, s.init, s.dtype, s.decay), SPECS["layers"]
        ),
    }
    cut = lambda t: {**t, "layers": jax.tree.map(lambda x: x[1:2], t["layers"])}
    alone, alone_state = descend(make(ALL[name], one, steps=5), cut(params()), [cut(g) for g in grads])
    close(cut(whole)["layers"], alone["layers"], rtol=2e-5, atol=1e-6)
    close(jax.tree.map(lambda x: x[1:2], state.stacked), alone_state.stacked, rtol=2e-5, atol=1e-6)


@pytest.mark.quick
@each
def test_norms_and_biases_do_not_decay(name):
    """With zero gradients only weight decay moves anything: by the rate times the decay, and what may decay only."""
    p = params()
    moved, _ = descend(make(ALL[name], SPECS, steps=5), p, [jax.tree.map(jnp.zeros_like, p)])
    factor = 1 - 0.01 * ALL[name].weight_decay
    close(moved, jax.tree.map(lambda x, d: x * factor if d else x, p, decays(p)), rtol=2e-6)


def test_muon_orthogonalises_each_layers_matrices():
    config = Muon(RATE, weight_decay=0.0)
    p, g = params(), gradients(0)
    tx = make(config, SPECS, steps=5)
    u, _ = jax.jit(tx.update)(g, tx.init(p), p)
    for path, shape in (("query", (4, 6)), ("out", (6, 4))):
        for layer in range(3):
            found = np.asarray(u["layers"][path]["kernel"][layer]).reshape(shape)
            matrix = g["layers"][path]["kernel"][layer].reshape(shape)
            plain = optax.contrib.muon(0.01, beta=0.95, consistent_rms=0.2)
            w = jnp.zeros(shape)
            expected, _ = plain.update(matrix, plain.init(w), w)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
            left, _, right = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
            polar = -left @ right
            cosine = np.sum(found * polar) / np.linalg.norm(found) / np.linalg.norm(polar)
            assert cosine > 0.97
            singular = np.linalg.svd(found / (0.01 * 0.2 * np.sqrt(6)), compute_uv=False)
            assert singular.min() > 0.5
            assert singular.max() < 1.3
    adam = make(AdamW(RATE, weight_decay=0.0), SPECS, steps=5)
    expected, _ = jax.jit(adam.update)(g, adam.init(p), p)
    for name in ("embedding", "head"):
        close(u[name], expected[name])
    close(u["layers"]["norm"], expected["layers"]["norm"])
    close(u["layers"]["out"]["bias"], expected["layers"]["out"]["bias"])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("config", "values"),
    [
        (Constant(0.5), {0: 0.5, 19: 0.5}),
        (WarmupCosine(0.5, 4, 0.1), {0: 0.125, 3: 0.5, 4: 0.5, 12: 0.275, 20: 0.05}),
        (WarmupLinear(0.5, 4, 0.2), {0: 0.125, 3: 0.5, 4: 0.5, 12: 0.3, 20: 0.1}),
        (WarmupStableDecay(0.5, 4, 10, 0.0), {0: 0.125, 3: 0.5, 4: 0.5, 10: 0.5, 15: 0.25, 20: 0.0}),
        (WarmupLinear(0.5, 0, 0.0), {0: 0.5, 10: 0.25, 20: 0.0}),
    ],
    ids=lambda x: type(x).__name__,
)
def test_schedules(config, values):
    rate = schedule(config, 20)
    np.testing.assert_allclose([rate(jnp.int32(i)) for i in values], list(values.values()), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("steps", "warmup"), [(5, 0), (40, 4), (400, 40), (5000, 100)])
def test_a_warm_up_that_is_not_given_is_a_tenth_of_the_run(steps, warmup):
    found = [float(schedule(WarmupCosine(peak=1.0), steps)(i)) for i in range(warmup + 2)]
    rising = [(i + 1) / warmup for i in range(warmup)]
    np.testing.assert_allclose(found[: warmup + 1], [*rising, 1.0], rtol=1e-6)
    assert found[-1] < 1.0


@pytest.mark.parametrize("kind", [AdamW, Lion, Muon, Adafactor, SGD])
@pytest.mark.parametrize("steps", [1, 2, 40])
def test_every_optimiser_fits_a_short_run_by_itself(kind, steps):
    make(kind(), SPECS, steps=steps)
    make(kind(schedule=WarmupStableDecay()), SPECS, steps=steps)


@pytest.mark.quick
def test_bad_options():
    with pytest.raises(UserError, match="warm-up and decay take 30 steps, but the run has 20"):
        make(AdamW(WarmupStableDecay(warmup=10, decay=20)), SPECS, steps=20)
    for bad, match in (
        (lambda: AdamW(b1=1.0), r"AdamW.b1 = 1.0 is outside \[0.0, 1.0\)"),
        (lambda: SGD(momentum=-0.1), "momentum = -0.1"),
        (lambda: Lion(weight_decay=-1.0), "weight_decay = -1.0"),
        (lambda: Muon(Constant(0.0)), "learning rate 0.0"),
        (lambda: AdamW(WarmupLinear(warmup=-1)), "warmup = -1 steps"),
        (lambda: AdamW(WarmupLinear(final=2.0)), "final = 2.0"),
    ):
        with pytest.raises(UserError, match=match):
            bad()


@pytest.mark.quick
@each
def test_all_reduce_a_quadratic(name):
    p = params()
    loss = lambda p: sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(p))
    tx = make(ALL[name], SPECS, steps=40)
    update, state, first = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p)), tx.init(p), loss(p)
    for _ in range(40):
        u, state = update(p, state)
        p = optax.apply_updates(p, u)
    assert loss(p) < 0.6 * first


@pytest.mark.quick
@each
def test_moments_lie_like_their_parameters(name):
    tx = make(ALL[name], SPECS, steps=5)
    shapes = jax.eval_shape(tx.init, params())
    specs = state_specs(shapes, SPECS)
    leaves = jax.tree_util.tree_flatten_with_path(specs, is_leaf=lambda x: isinstance(x, ParamSpec))[0]
    assert len(leaves) == len(jax.tree.leaves(shapes))
    found = 0
    for path, s in leaves:
        text = jax.tree_util.keystr(path)
        if s.shape == (3, 4, 2, 3) and "query" in text:
            assert s.axes == ("layers", "embed", "heads", "head_size")
            found += 1
        elif s.shape == (10, 4) and "tokens" in text:
            assert s.axes == ("vocabulary", "embed")
            found += 1
        elif ".stacked" in text and s.shape == (3,):
            assert s.axes == ("layers",)
    assert found == {"adamw": 4, "lion": 2, "muon": 3, "adafactor": 0, "sgd": 2}[name]


def test_a_layer_can_be_reset_alone():
    """The state of one layer put back to its start changes no other layer's next update."""
    tx = make(ALL["adamw"], SPECS, steps=5)
    p, state = descend(tx, params(), [gradients(0), gradients(1)])
    fresh = tx.init(p)
    reset = state._replace(stacked=jax.tree.map(lambda a, b: a.at[1].set(b[1]), state.stacked, fresh.stacked))
    update = jax.jit(tx.update)
    a, b = (update(gradients(2), s, p)[0] for s in (state, reset))
    for layer in (0, 2):
        assert_bitwise(*(jax.tree.map(lambda x, i=layer: x[i], u["layers"]) for u in (a, b)))
    assert not np.allclose(a["layers"]["query"]["kernel"][1], b["layers"]["query"]["kernel"][1])
