"""A stack of 6 layers in 6 stages (or 3, or 2), with embedding and head, that every strategy is tried on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.models.spec import Normal, ParamSpec, init
from jaxpar.optimisers import make
from jaxpar.optimisers_config import AdamW, WarmupCosine
from jaxpar.recovery.base import Stages
from jaxpar.recovery.transform import RECOVERY, recovering
from jaxpar.step import Batch, Control, Gradients, chain
from jaxpar.steps.base import make_step

LAYERS, WIDTH, WORDS, ROWS, LENGTH = 6, 4, 10, 8, 5
SPECS = {
    "embedding": {"tokens": ParamSpec((WORDS, WIDTH), ("vocabulary", "embed"), Normal(0.5))},
    "layers": {
        "into": {"kernel": ParamSpec((LAYERS, WIDTH, 8), ("layers", "embed", "mlp"), Normal(0.5))},
        "out": {"kernel": ParamSpec((LAYERS, 8, WIDTH), ("layers", "mlp", "embed"), Normal(0.5))},
        "norm": {"scale": ParamSpec((LAYERS, WIDTH), ("layers", "norm"), Normal(1.0), decay=False)},
    },
    "head": {"kernel": ParamSpec((WIDTH, WORDS), ("embed", "vocabulary"), Normal(0.5))},
}
RATE = 0.01


def logits(params, tokens):
    h = params["embedding"]["tokens"][tokens]

    def layer(h, p):
        inner = jnp.tanh((h * p["norm"]["scale"][None, None]) @ p["into"]["kernel"])
        return h + inner @ p["out"]["kernel"], None

    h, _ = jax.lax.scan(layer, h, params["layers"])
    return h @ params["head"]["kernel"]


def grad_fn(params, batch, control, key) -> Gradients:
    def loss(params):
        log_p = jax.nn.log_softmax(logits(params, batch.tokens))
        nats = -jnp.take_along_axis(log_p, batch.targets[..., None], axis=-1)[..., 0]
        return jnp.sum(nats * batch.weights)

    value, grads = jax.value_and_grad(loss)(params)
    return Gradients(value, jnp.sum(batch.weights), grads)


@functools.cache
def batch_at(position: int) -> Batch:
    """The batch that begins at an example, as `Pipeline.batches` would give it."""
    draw = np.random.default_rng(position)
    tokens = draw.integers(0, WORDS, (ROWS, LENGTH), np.int32)
    targets = (tokens * 3 + 1) % WORDS
    weights = draw.uniform(0.5, 1.5, (ROWS, LENGTH)).astype(np.float32)
    ones = np.ones((ROWS, LENGTH), np.int32)
    at = np.arange(ROWS, dtype=np.int32)
    return jax.tree.map(jnp.asarray, Batch(tokens, targets, weights, ones, ones, at + position))


def bare(optimiser=None):
    return make_step(grad_fn, make(optimiser or AdamW(schedule=WarmupCosine(peak=RATE, warmup=4)), SPECS, steps=40))


def step_of(strategy, *transforms, stages: int = 6, optimiser=None, **more):
    """A step with the strategy outside all other transforms."""
    return chain(bare(optimiser), *transforms, recovering(strategy, Stages(stages, SPECS, **more)))


def state_of(step):
    return step.init(jax.tree.map(jnp.copy, init(SPECS, jax.random.key(0))), jax.random.key(1))


def train(step, steps: int, state=None):
    """Healthy steps, each with the batch that the state asks for."""
    update = jax.jit(step.update)
    state = state_of(step) if state is None else state
    for _ in range(steps):
        state, _ = update(state, batch_at(int(state.data_position)))
    return state


def failing(*lost: int, stages: int = 6) -> Control:
    return Control(failed=jnp.asarray(mask(*lost, stages=stages)))


def mask(*lost: int, stages: int = 6) -> np.ndarray:
    return np.isin(np.arange(stages), lost)


def model_of(state):
    """All but the recovery's own slot."""
    slots = {name: slot for name, slot in state.slots.items() if name != RECOVERY}
    return state.replace(slots=slots)
