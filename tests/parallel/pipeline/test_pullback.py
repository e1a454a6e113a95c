"""A stage's backward pass in pieces: the same numbers as `jax.vjp`, nothing kept that can be had, nothing done twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context
from jaxpar.parallel.pipeline.pullback import pullback

CFG = ModelConfig(
    vocabulary=32, layers=2, width=32, heads=4, kv_heads=2, hidden=48, init_std=0.2, layer_loop="unroll", dropout=0.1
)
B, T = 2, 8


@pytest.fixture(scope="module")
def stage():
    layers = decoder.init(CFG, jax.random.key(0))["layers"]
    x = jax.random.normal(jax.random.key(1), (B, T, CFG.width))
    aux = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)), jnp.ones((B, T), jnp.int32), jnp.arange(B)

    def f(layers, x, aux):
        ctx = Context(aux[0], aux[1], key=jax.random.key(3), sample_ids=aux[2])
        return decoder.blocks(CFG, layers, x, ctx)[0]

    return f, layers, x, aux, pullback(f, layers, x, aux)


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5 * float(np.abs(y).max()))


def test_whole_and_split_backward_passes_are_jax_vjp(stage):
    f, layers, x, aux, pieces = stage
    dy = jax.random.normal(jax.random.key(2), x.shape)
    y, kept = jax.jit(pieces.forward)(layers, x, aux)
    expected, pull = jax.vjp(lambda p, x: f(p, x, aux), layers, x)
    close(y, expected)
    d_layers, dx = pull(dy)
    close(jax.jit(pieces.pull)(layers, aux, kept, dy), (d_layers, dx))
    first, for_weights = jax.jit(pieces.pull_input)(layers, aux, kept, dy)
    close(first, dx)
    close(jax.jit(pieces.pull_weights)(layers, aux, for_weights), d_layers)


def test_what_lies_in_no_buffer_is_kept_whole(stage):
    f, layers, x, aux, _ = stage
    pieces = pullback(f, layers, x, aux, thin=False)
    dy = jax.random.normal(jax.random.key(2), x.shape)
    kept = jax.jit(pieces.forward)(layers, x, aux)[1]
    d_layers, dx = jax.jit(lambda dy: jax.vjp(lambda p, x: f(p, x, aux), layers, x)[1](dy))(dy)
    close(jax.jit(pieces.pull)(layers, aux, kept, dy), (d_layers, dx))
    # All of it: weights and inputs that differ do not change what the backward pass reads.
    nothing = jax.tree.map(jnp.zeros_like, (layers, aux))
    close(jax.jit(pieces.pull)(*nothing, kept, dy), (d_layers, dx))


def test_the_two_halves_do_the_work_of_the_whole(stage):
    """Every matrix product of the backward pass is in exactly one half, and both have some."""
    whole, first, second = (stage[-1].products()[name] for name in ("B", "BI", "BW"))
    assert first + second == whole
    assert min(first, second) >= 7 * CFG.layers, "seven projections a layer have one product in each half"


def test_no_weights_rotary_tables_or_dropout_masks_are_kept(stage):
    f, layers, x, aux, pieces = stage
    kept = jax.eval_shape(pieces.forward, layers, x, aux)[1]
    plain = jax.tree.leaves(jax.eval_shape(lambda p, x: jax.vjp(lambda p, x: f(p, x, aux), p, x)[1], layers, x))
    size = lambda leaves: sum(leaf.size for leaf in leaves)
    # Everything kept is an activation: it has the microbatch's rows and tokens.
    assert all(leaf.shape[0] == B and T in leaf.shape for leaf in kept)
    weights = sum(w.size for w in jax.tree.leaves(layers))
    assert size(plain) - size(kept) > 0.9 * weights, "jax.vjp alone keeps the weights too"
    # What products read and flash attention keeps: two inputs of branches and their norms, q, k, v, the output and its
    # log-sum-exp, gate and up. Activation functions, scaled norms and residual sums are made again.
    heads = 2 * CFG.heads * CFG.head_size + 2 * CFG.kv_heads * CFG.head_size + CFG.heads
    assert size(kept) <= CFG.layers * B * T * (2 * CFG.width + 4 + heads + 2 * CFG.hidden)


def test_trees_as_states_and_parameters_that_are_not_used():
    """A residual operator's state is a tree, and some parameters may not matter to a stage."""

    def f(params, x, aux):
        return {"a": jnp.sin(x["a"] @ params["w"]) * aux, "b": x["b"] * params["v"] + x["a"].sum()}

    params = {"w": jnp.eye(3) * 0.5, "v": jnp.float32(2.0), "unused": jnp.ones(4)}
    x, aux = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}, jnp.float32(3.0)
    pieces = pullback(f, params, x, aux)
    dy = {"a": jnp.ones((2, 3)), "b": jnp.arange(3.0)}
    _, kept = pieces.forward(params, x, aux)
    expected = jax.vjp(lambda p, x: f(p, x, aux), params, x)[1](dy)
    close(pieces.pull(params, aux, kept, dy), expected)
    dx, for_weights = pieces.pull_input(params, aux, kept, dy)
    close((pieces.pull_weights(params, aux, for_weights), dx), expected)
