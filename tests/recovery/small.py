"""A stack of 6 layers in 6 stages (or 3, or 2), with embedding and head, that every strategy is tried on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.models.spec import Normal, ParamSpec, init
from jaxpar.optimisers import make
from jaxpar.optimisers_config import AdamW, WarmupCosine
from jaxpar.recovery.base import Stages
from jaxpar.recovery.transform import RECOVERY, recovering, repair
from jaxpar.step import Batch, Control, Gradients, chain
from jaxpar.steps.base import make_step
from jaxpar.steps.ema import ema
from tests.steps.tiny import numbers

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
RATE, DECAY = 0.01, 0.9


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


@functools.cache
def _trained():
    return train(chain(bare(), ema(DECAY)), 5)


def trained(strategy, stages: int = 6):
    """A state after 5 healthy steps, with an average of its parameters, and the slot of a strategy."""
    state = jax.tree.map(jnp.copy, _trained())
    kept = strategy.persistent(state, here(stages))
    return state.add_slot(RECOVERY, {"failures": jnp.int32(0), "replayed": jnp.int32(0), "of": kept})


def here(stages: int = 6) -> Stages:
    step = chain(bare(), ema(DECAY))
    return Stages(stages, SPECS, ema_decay=DECAY, init=lambda params: step.init(params, jax.random.key(0)))


@functools.cache
def repairing(strategy, stages: int = 6):
    """(state, failed) -> (state, Report), compiled once a strategy."""
    return jax.jit(lambda state, failed_S: repair(strategy, here(stages), state, failed_S))


def rows_of(state, stage: int, *, ends: bool = False, stages: int = 6):
    """What stage `stage` holds, found by names alone: {path: (array, the slice that is the stage's)}."""
    each = LAYERS // stages
    found = {}
    for path, x in jax.tree_util.tree_flatten_with_path(numbers(model_of(state)))[0]:
        name = jax.tree_util.keystr(path)
        if "layers" in name or ".stacked" in name:
            assert x.shape[0] == LAYERS, name
            found[name] = (x, slice(stage * each, (stage + 1) * each))
        elif ends and (("embedding" in name and stage == 0) or ("head" in name and stage == stages - 1)):
            found[name] = (x, slice(None))
    return found


def scrambled(state, stage: int, *, ends: bool = False, stages: int = 6):
    """The same state with other numbers in all that a stage holds."""
    names = rows_of(state, stage, ends=ends, stages=stages)

    def one(path, x):
        name = jax.tree_util.keystr(path)
        if name not in names:
            return x
        where = names[name][1]
        return x.at[where].set((x[where] * 3 + 7).astype(x.dtype))

    return jax.tree_util.tree_map_with_path(one, state)
