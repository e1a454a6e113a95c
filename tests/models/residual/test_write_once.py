"""The write-once loop: backward memory linear in depth, the same gradients in every form of the loop."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context
from jaxpar.models.residual.attention_residuals import AttentionResiduals
from jaxpar.models.residual.dense_former import DenseFormer
from jaxpar.models.route import Route

CFG = ModelConfig(vocabulary=16, layers=4, width=16, heads=2, hidden=16, context=16, init_std=0.3)
TOKENS = np.random.default_rng(0).integers(0, 16, (2, 8), np.int32)


@dataclasses.dataclass(frozen=True)
class Naive(AttentionResiduals):
    """The same operator, its buffer carried through the loop as any state is."""

    write_once = False


def temporary_bytes(mixer, layers, **changes):
    """Of a compiled training step; rows of tokens large beside everything else."""
    cfg = CFG.replace(residual=mixer, layers=layers, **changes)
    params = jax.eval_shape(partial(decoder.init, cfg), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32)
    loss = lambda params, tokens: decoder.loss(cfg, params, tokens, tokens).loss_sum
    return jax.jit(jax.grad(loss)).lower(params, tokens).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", ["full", "none"])
def test_backward_memory_is_linear_in_depth(remat):
    small, large = (temporary_bytes(AttentionResiduals(), n, remat=remat) for n in (8, 16))
    assert large / small < 2.2


def test_a_naive_carry_has_quadratic_memory():
    """What the loop is for: the measure of the test above tells the two apart."""
    small, large = (temporary_bytes(Naive(), n, remat="full") for n in (16, 32))
    assert large / small > 3


@partial(jax.jit, static_argnums=0)
def loss_and_gradients(cfg, params, ctx):
    return jax.value_and_grad(lambda p: decoder.loss(cfg, p, TOKENS, TOKENS, ctx=ctx).loss_sum)(params)


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(b)) + 1e-6))


def test_every_form_of_the_loop_has_the_gradients_of_the_naive_carry():
    """Scanned and unrolled, with rematerialisation, windows of two kinds, and dropout."""
    cfg = CFG.replace(
        layers=2, residual=AttentionResiduals(block=3), window=3, window_pattern=(True, False), dropout=0.1
    )
    params = decoder.init(cfg, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    ctx = Context(key=jax.random.key(3), sample_ids=jnp.arange(2))
    expected = loss_and_gradients(cfg.replace(residual=Naive(block=3)), params, ctx)
    for change in ({}, {"remat": "dots", "layer_loop": "unroll"}):
        assert_close(loss_and_gradients(cfg.replace(**change), params, ctx), expected)


@pytest.mark.parametrize("layers", [4, 3])
def test_blocks_of_layers_that_look_at_sources_together_have_the_gradients_of_the_naive_carry(layers):
    """Scanned and unrolled, a last block that is cut short, and slices: one goes on where the other left a block open."""
    cfg = CFG.replace(
        layers=layers, residual=AttentionResiduals(4, "two"), window=3, window_pattern=(True, False), dropout=0.1
    )
    params = decoder.init(cfg, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    ctx = Context(key=jax.random.key(3), sample_ids=jnp.arange(2))
    expected = loss_and_gradients(cfg.replace(residual=Naive(4, "two")), params, ctx)
    for change in ({}, {"remat": "dots", "layer_loop": "unroll"}):
        assert_close(loss_and_gradients(cfg.replace(**change), params, ctx), expected)

    @partial(jax.jit, static_argnums=(2, 3))
    def in_slices(params, first, cut, divisor):
        state = decoder.embed(cfg, params, TOKENS, ctx)
        for a, b in ((0, cut), (cut, layers)):
            some = jax.tree.map(lambda x, a=a, b=b: x[a:b], params["layers"])
            state, _ = decoder.blocks(cfg, some, state, ctx, a if first is None else first + a, divisor=divisor)
        return decoder.head(cfg, params, state, ctx, TOKENS).loss_sum

    assert_close(jax.value_and_grad(in_slices)(params, None, 1, 1), expected)
    # As stages of a pipeline, whose first layer is traced.
    assert_close(jax.value_and_grad(in_slices)(params, 0, 2, 2), expected)


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_what_stood_where_a_block_writes_has_no_gradient(loop):
    cfg = CFG.replace(residual=AttentionResiduals(4, "two"), layer_loop=loop)
    params = decoder.init(cfg, jax.random.key(0))

    @jax.jit
    def loss(slots):
        state = decoder.embed(cfg, params, TOKENS, Context())
        state, _ = decoder.blocks(cfg, params["layers"], state._replace(slots=slots), Context(), 0, divisor=4)
        return decoder.head(cfg, params, state, Context(), TOKENS).loss_sum

    found = jax.grad(loss)(
        jnp.asarray(np.random.default_rng(0).normal(size=(3, *TOKENS.shape, cfg.width)), jnp.float32)
    )
    assert np.asarray(found[0]).any()
    assert not np.asarray(found[1:]).any()


def additions(cfg) -> int:
    """How often a training step adds up arrays as large as all sources, or writes into one."""

    def times(jaxpr, turns=1):
        found = 0
        for eqn in jaxpr.eqns:
            large = eqn.outvars[0].aval.shape == (cfg.residual.slots(cfg), *TOKENS.shape, cfg.width)
            found += turns * (eqn.primitive.name in ("add", "add_any", "dynamic_update_slice") and large)
            more = turns * eqn.params["length"] if eqn.primitive.name == "scan" else turns
            found += sum(times(inner, more) for inner in jaxprs_in_params(eqn.params))
        return found

    params = jax.eval_shape(partial(decoder.init, cfg), jax.random.key(0))
    return times(jax.make_jaxpr(jax.grad(lambda p: decoder.loss(cfg, p, TOKENS, TOKENS).loss_sum))(params).jaxpr)


def test_a_block_of_layers_looks_at_its_sources_once():
    """They and their gradient are written to once a block, however many layers it has; in the direct form by each of them."""
    of = lambda phases, layers: additions(CFG.replace(layers=layers, residual=AttentionResiduals(layers, phases)))
    assert of("two", 12) == of("two", 8)
    assert of("direct", 12) >= of("direct", 8) + 4


def test_slices_of_the_stack_are_the_whole_with_a_traced_first_layer():
    """What a pipeline does; the payload is the state itself."""
    cfg = CFG.replace(residual=AttentionResiduals(block=3))
    params = decoder.init(cfg, jax.random.key(0))

    @jax.jit
    def loss(params, first):
        state, ctx = decoder.embed(cfg, params, TOKENS, Context()), Context()
        for i in range(2):
            half = jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], params["layers"])
            wire = cfg.residual.to_wire(cfg, decoder.blocks(cfg, half, state, ctx, first + 2 * i)[0])
            state = cfg.residual.from_wire(cfg, wire)
        return decoder.head(cfg, params, state, ctx, TOKENS).loss_sum

    assert_close(jax.value_and_grad(loss)(params, 0), loss_and_gradients(cfg, params, Context()))


def test_what_cannot_be_is_refused():
    cfg = CFG.replace(residual=DenseFormer())
    params = jax.eval_shape(partial(decoder.init, cfg), jax.random.key(0))
    route = Context(route=Route(keep=jnp.ones(4, bool)))
    with pytest.raises(
        ValueError, match=r"model.residual = DenseFormer reads a source of every layer.*without skipping"
    ):
        jax.eval_shape(lambda p: decoder.apply(cfg, p, TOKENS, route).logits, params)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("mixer", "words"),
    [
        (AttentionResiduals(block=9), ("block = 9", "8", "layers = 4")),
        (DenseFormer(dilation=5), ("dilation = 5", "layers = 4")),
        (DenseFormer(period=0), ("period = 0", "1 to model.layers = 4")),
    ],
    ids=str,
)
def test_a_mixer_that_does_not_fit_the_model_is_refused_at_once(mixer, words):
    with pytest.raises(ValueError, match=".*".join(words)):
        CFG.replace(residual=mixer)
