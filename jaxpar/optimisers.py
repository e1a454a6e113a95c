"""Optimisers from optax, with a state for each layer of the stack.

Stacked parameters are updated by `vmap` over the layers: the count is [L], Muon and Adafactor see each layer's own
matrices, and any layer (and so any stage of a pipeline) can be lost and reset alone, whatever the grouping into stages.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import optax

from jaxpar.errors import UserError
from jaxpar.models.spec import LAYERS, ParamSpec, is_spec, map_specs, path_name
from jaxpar.optimisers_config import (
    SGD,
    Adafactor,
    AdamW,
    AnyOptimiser,
    Constant,
    Lion,
    Muon,
    Schedule,
    WarmupCosine,
    WarmupLinear,
    WarmupStableDecay,
)

Tree = Any


class PerLayerState(NamedTuple):
    """Attributes:
    stacked: the state of the stack of layers; every leaf has the leading `layers` dimension.
    rest: the state of all other parameters.
    """

    stacked: Tree
    rest: Tree


def schedule(config: Schedule, steps: int) -> optax.Schedule:
    """The learning rate as a function of the count.

    Raises:
      UserError: warm-up and decay that do not fit into `steps`.
    """
    length = lambda given, most: min(steps // 10, most) if given is None else given
    warmup, decay = length(getattr(config, "warmup", 0), 100), length(getattr(config, "decay", 0), steps)
    used = warmup + decay
    if used > steps:
        raise UserError(
            f"the schedule's warm-up and decay take {used} steps, but the run has {steps}; shorten them or train longer"
        )
    match config:
        case Constant():
            return optax.constant_schedule(config.peak)
        case WarmupCosine():
            down = optax.cosine_decay_schedule(config.peak, max(steps - warmup, 1), config.final)
        case WarmupLinear():
            down = optax.linear_schedule(config.peak, config.final * config.peak, max(steps - warmup, 1))
        case WarmupStableDecay():
            fall = optax.linear_schedule(config.peak, config.final * config.peak, max(decay, 1))
            flat = optax.constant_schedule(config.peak)
            down = optax.join_schedules([flat, fall], [steps - warmup - decay])
    # The first step already moves: count 0 has 1/warmup of the peak, not 0.
    up = lambda count: config.peak * (count + 1) / max(warmup, 1)
    return optax.join_schedules([up, down], [warmup])


def make(config: AnyOptimiser, specs: Tree, *, steps: int) -> optax.GradientTransformation:
    """The optimiser for parameters declared by `specs`.

    Args:
      specs: a tree of `ParamSpec` whose `layers` entry holds the stacked parameters.
      steps: updates in the whole run, for the schedule.

    Raises:
      UserError: a schedule that does not fit into the run.
    """
    rate = schedule(config.schedule, steps)
    stacked, rest = _split(specs)
    # What one layer sees: its own matrices, without the leading dimension.
    one_layer = map_specs(lambda s: ParamSpec(s.shape[1:], s.axes[1:], s.init, s.dtype, s.decay), stacked)
    inner, outer = _make(config, rate, one_layer, hidden=True), _make(config, rate, rest, hidden=False)

    def init(params):
        layers, others = _split(params)
        return PerLayerState(jax.vmap(inner.init)(layers), outer.init(others))

    def update(grads, state, params=None):
        (g_layers, g_rest), (p_layers, p_rest) = _split(grads), _split(params)
        u_layers, s_layers = jax.vmap(inner.update)(g_layers, state.stacked, p_layers)
        u_rest, s_rest = outer.update(g_rest, state.rest, p_rest)
        return {LAYERS: u_layers, **u_rest}, PerLayerState(s_layers, s_rest)

    return optax.GradientTransformation(init, update)


def _split(tree: Tree) -> tuple[Tree, Tree]:
    return tree[LAYERS], {name: value for name, value in tree.items() if name != LAYERS}


def _make(config: AnyOptimiser, rate: optax.Schedule, specs: Tree, *, hidden: bool) -> optax.GradientTransformation:
    decays = map_specs(lambda s: s.decay, specs)
    match config:
        case AdamW():
            return optax.adamw(
                rate, config.b1, config.b2, config.epsilon, weight_decay=config.weight_decay, mask=decays
            )
        case Lion():
            return optax.lion(rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=decays)
        case Muon():
            return _muon(config, rate, specs, decays, hidden)
        case Adafactor():
            scale = optax.adafactor(
                learning_rate=None,
                min_dim_size_to_factor=config.smallest,
                multiply_by_parameter_scale=False,
                clipping_threshold=config.clip,
            )
            # optax's own weight decay is not scaled by the learning rate; ours is, as for all others.
            return optax.chain(
                scale,
                optax.add_decayed_weights(-config.weight_decay, decays),
                optax.scale_by_schedule(rate),
            )
        case SGD():
            momentum = config.momentum or None
            return optax.chain(
                optax.add_decayed_weights(config.weight_decay, decays),
                optax.sgd(rate, momentum=momentum, nesterov=config.nesterov),
            )


def matrix_dimensions(name: str, spec: ParamSpec) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Which dimensions of a layer's kernel are summed over (rows) and which it gives (columns); None: no matrix."""
    if not name.endswith("/kernel") or len(spec.shape) < 2:
        return None
    dims = tuple(range(len(spec.shape)))
    into = spec.axes[0] == "embed"
    return (dims[:1], dims[1:]) if into else (dims[:-1], dims[-1:])


def _muon(config: Muon, rate, specs: Tree, decays: Tree, hidden: bool) -> optax.GradientTransformation:
    def dimensions(path, s: ParamSpec):
        found = matrix_dimensions(path_name(path), s) if hidden else None
        return None if found is None else optax.contrib.MuonDimensionNumbers(*found)

    labels = jax.tree_util.tree_map_with_path(
        lambda path, s: "adam" if dimensions(path, s) is None else "muon", specs, is_leaf=is_spec
    )
    numbers = jax.tree_util.tree_map_with_path(
        lambda path, s: dimensions(path, s) or optax.MaskedNode(), specs, is_leaf=is_spec
    )
    # Not `optax.contrib.muon`: its Adam decays norms and biases too, and is Nesterov's.
    matrices = optax.chain(
        optax.contrib.scale_by_muon(
            ns_steps=config.steps, beta=config.momentum, eps=config.epsilon, weight_dimension_numbers=lambda _: numbers
        ),
        optax.stateless(lambda updates, _: jax.tree.map(_like_adam, updates, numbers)),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(rate),
    )
    adam = optax.adamw(rate, config.b1, config.b2, config.epsilon, weight_decay=config.weight_decay, mask=decays)
    return optax.partition({"muon": matrices, "adam": adam}, labels)


def _like_adam(update, numbers):
    """An orthogonal matrix scaled to the root mean square of AdamW's updates."""
    rows, columns = (math.prod(update.shape[d] for d in dims) for dims in numbers)
    return 0.2 * math.sqrt(max(rows, columns)) * update
