"""What the backward pass of a layer's cheap parts keeps: what they were given and numbers of a token, nothing that follows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context
from jaxpar.models.feedforward.dense import MLP, GatedMLP
from jaxpar.models.norms import LayerNorm, RMSNorm
from jaxpar.models.spec import init

B, T, D, F = 2, 8, 16, 32
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.bfloat16)


def kept(f, *args) -> list:
    """Shapes and dtypes of what `jax.vjp` keeps of `f`, each array once."""
    arrays = {}

    def traced(*args):
        _, pull = jax.vjp(f, *args)
        arrays.update({id(x): x for x in jax.tree.leaves(pull)})
        return list(arrays.values())

    return [(x.shape, x.dtype.name) for x in jax.eval_shape(traced, *args)]


@pytest.mark.quick
@pytest.mark.parametrize("norm", [RMSNorm(), RMSNorm(unit_offset=True), LayerNorm()], ids=repr)
def test_of_a_norm_its_input_and_the_statistics_are_kept(norm):
    params = {name: jnp.ones(spec.shape) for name, spec in norm.spec(D).items()}
    found = kept(norm, params, X)
    assert [k for k in found if np.prod(k[0]) >= X.size] == [(X.shape, "bfloat16")]
    assert sum(k == ((B, T, 1), "float32") for k in found) == (2 if isinstance(norm, LayerNorm) else 1)


@pytest.mark.quick
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("layer", "products"), [(GatedMLP, 2), (MLP, 1)])
def test_of_a_feedforward_layer_its_products_and_what_it_multiplies_last_are_kept(layer, products, activation):
    """[B, T, F] arrays: before the activation one for each product, and behind it one."""
    cfg = ModelConfig(vocabulary=8, layers=1, width=D, heads=2, hidden=F, context=T, feedforward=layer(activation))
    params = jax.tree.map(lambda x: x.astype(X.dtype), init(cfg.feedforward.spec(cfg), jax.random.key(0)))
    found = kept(lambda params, x: cfg.feedforward.apply(cfg, params, x, Context().ops), params, X)
    assert [k for k in found if k[0][-1] == F and k[0][:2] == (B, T)] == [((B, T, F), "bfloat16")] * (products + 1)
