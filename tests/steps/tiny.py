"""A model of 3 layers with 90-odd parameters, small enough that every law is checked of every transform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.models.spec import Normal, ParamSpec, init
from jaxpar.optimisers import make
from jaxpar.optimisers_config import AdamW, Constant
from jaxpar.step import Batch, Gradients, chain
from jaxpar.steps.base import make_step

LAYERS, ROWS, LENGTH, STEPS = 3, 8, 5, 4
SPECS = {
    "layers": {
        "a": {"kernel": ParamSpec((3, 4, 6), ("layers", "embed", "mlp"), Normal(0.5))},
        "norm": {"scale": ParamSpec((3, 4), ("layers", "norm"), Normal(1.0), decay=False)},
    },
    "head": {"kernel": ParamSpec((4, 6), ("embed", "vocabulary"), Normal(0.5))},
}


def grad_fn(params, batch, control, key) -> Gradients:
    """A weighted square error, summed over tokens. No randomness."""

    def loss(params):
        h = jnp.sin(batch.tokens[..., None] * jnp.arange(1.0, 5.0)[None, None])
        for layer in range(LAYERS):
            scale, kernel = params["layers"]["norm"]["scale"][layer], params["layers"]["a"]["kernel"][layer]
            h = h + jnp.tanh((h * scale[None, None]) @ kernel) @ kernel.T
        errors = jnp.sum(jnp.square(h @ params["head"]["kernel"] - batch.targets[..., None]), axis=-1)
        return jnp.sum(errors * batch.weights)

    value, grads = jax.value_and_grad(loss)(params)
    return Gradients(value, jnp.sum(batch.weights), grads)


def batch_of(i: int, *, target: int = 0, nan: bool = False) -> Batch:
    """Rows of unequal weight; `target` makes loss and gradient large, `nan` makes one row not finite."""
    draw = np.random.default_rng(i)
    tokens = draw.integers(0, 50, (ROWS, LENGTH), np.int32)
    targets = draw.integers(0, 3, (ROWS, LENGTH), np.int32) + np.int32(target)
    weights = draw.uniform(0.1, 2.0, (ROWS, LENGTH)).astype(np.float32)
    weights[1] = 0.0
    if nan:
        weights[2, 3] = np.nan
    ones = np.ones((ROWS, LENGTH), np.int32)
    at = np.arange(ROWS, dtype=np.int32)
    return jax.tree.map(jnp.asarray, Batch(tokens, targets, weights, ones, ones, at + i * ROWS))


def bare(optimiser=None, gradients=grad_fn):
    return make_step(gradients, make(optimiser or AdamW(schedule=Constant(0.01)), SPECS, steps=100))


def state_of(step):
    return step.init(params(), jax.random.key(1))


@functools.cache
def _params():
    return init(SPECS, jax.random.key(0))


def params():
    """A copy each time: a test may donate it."""
    return jax.tree.map(jnp.copy, _params())


def wrapped(*transforms):
    return chain(bare(), *transforms)


def run(step, batches, state=None, controls=None, options=None):
    """The state after each update, and the metrics, under jit."""
    update = jax.jit(step.update, compiler_options=options)
    state = state_of(step) if state is None else state
    states, metrics = [], []
    for i, batch in enumerate(batches):
        state, found = update(state, batch, None if controls is None else controls[i])
        states.append(state)
        metrics.append({name: float(value) for name, value in found.items()})
    return states, metrics


def numbers(tree):
    """A tree on the host; random keys as their words."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree)


def assert_bitwise(a, b):
    """The same structure, dtypes and bits (a NaN is itself)."""
    a, b = numbers(a), numbers(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True):
        name = jax.tree_util.keystr(path)
        assert x.dtype == y.dtype, f"{name}: {x.dtype} and {y.dtype}"
        np.testing.assert_array_equal(x, y, err_msg=name)


def same(a, b) -> bool:
    try:
        assert_bitwise(a, b)
    except AssertionError:
        return False
    return True
