"""What parity means here: the first batch's gradients, three losses and the parameters behind them, beside one device's.

Used by `tests/parity`, which runs a part of the matrix, and by `matrix`, which runs all of it.
"""

from __future__ import annotations

from functools import cache, partial

import jax
import numpy as np

from jaxpar.adaptive.curriculum import exit_weights
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.exits.config import Adapter, EeLlm, Exits, Free
from jaxpar.models.feedforward.dense import MLP
from jaxpar.models.feedforward.duo import Duo
from jaxpar.models.norms import LayerNorm, RMSNorm
from jaxpar.models.positions import Learned, Rope
from jaxpar.models.residual.attention_residuals import AttentionResiduals
from jaxpar.models.residual.deep_delta import DeepDelta
from jaxpar.models.residual.manifold import ManifoldHyperConnections
from jaxpar.models.residual.mudd import MuddFormer
from jaxpar.models.residual.short_window import ShortWindow
from jaxpar.models.routing.depth import MixtureOfDepths
from jaxpar.models.spec import path_name
from jaxpar.optimisers import make
from jaxpar.optimisers_config import AdamW, Constant
from jaxpar.parallel.mesh import MeshConfig, make_mesh
from jaxpar.program import build
from jaxpar.state import abstract_state
from jaxpar.step import Batch, chain
from jaxpar.steps.accumulate import accumulate
from jaxpar.steps.base import make_step
from jaxpar.steps.clip import clip_global

LLAMA = ModelConfig(vocabulary=64, layers=8, width=32, heads=16, kv_heads=8, head_size=4, hidden=64, init_std=0.1)
MODELS = {
    "llama": LLAMA,
    "gpt2": LLAMA.replace(
        kv_heads=16, norm=LayerNorm(), positions=Learned(), feedforward=MLP(), qkv_bias=True, attention_out_bias=True
    ),
    "windows, dropout, untied": LLAMA.replace(
        window=5, window_pattern=(True, False), dropout=0.2, tied_embeddings=False, qk_norm=True, remat="full"
    ),
    "seven layers": LLAMA.replace(layers=7),
    "gemma": LLAMA.replace(
        norm=RMSNorm(unit_offset=True),
        norm_placement="pre_post",
        qk_norm=True,
        window=5,
        window_pattern=(True, False),
        positions=Rope(base=1e6, local_base=1e4),
        embedding_scale=32**0.5,
        attention_cap=20.0,
        logit_cap=10.0,
    ),
    "attention residuals": LLAMA.replace(layers=4, residual=AttentionResiduals(block=3)),
    "attention residuals, blocks": LLAMA.replace(layers=4, residual=AttentionResiduals(4)),
    "hyper-connections": LLAMA.replace(layers=4, residual=ManifoldHyperConnections(streams=2)),
    "deep delta": LLAMA.replace(layers=4, residual=DeepDelta(channels=4)),
    "deep delta over tokens": LLAMA.replace(
        layers=4, residual=DeepDelta(channels=2, compressor="tokens", embedding="convolution")
    ),
    "short window": LLAMA.replace(layers=4, residual=ShortWindow(4)),
    "two modules": LLAMA.replace(layers=4, feedforward=Duo(small=1 / 8, skip=0.2)),
    "two modules, routers": LLAMA.replace(
        layers=4, feedforward=Duo(small=1 / 8, routing="learned", budget=0.25, strength=10.0)
    ),
    "mixture of depths": LLAMA.replace(layers=4, depth=MixtureOfDepths(capacity=0.3)),
    "mudd": LLAMA.replace(layers=4, residual=MuddFormer()),
    "exits in stages": LLAMA.replace(
        layers=5, dropout=0.1, exits=Exits((1, 2, 4), Adapter(4), EeLlm((0.3, 0.5, 0.7), "cool_down", 4))
    ),
    "exits, routers": LLAMA.replace(
        layers=4,
        feedforward=Duo(small=1 / 8, routing="learned", budget=0.25, strength=10.0),
        exits=Exits((1,), Adapter(4), Free(0.5)),
    ),
    "exits, mixture of depths": LLAMA.replace(
        layers=4, depth=MixtureOfDepths(capacity=0.3), exits=Exits((2, 3), loss=EeLlm((0.3, 0.5)))
    ),
    "exits": LLAMA.replace(layers=4, dropout=0.1, exits=Exits((1,), Adapter(4), Free(0.5))),
}
# A large epsilon, so that a gradient that is nothing but rounding does not become a step of full size.
OPTIMISER = AdamW(schedule=Constant(1e-2), epsilon=1e-3)
ROWS, LENGTH, STEPS = 8, 16, 3
QUICK = {"xla_backend_optimization_level": 0}
"""LLVM's effort at CPU code, none: what is compared is the partitioned program, and compiling it is nearly all of the
time (2 to 4 times less so). XLA's own passes, the partitioner and fusion among them, are as in any run."""


def batch_of(step: int, rows: int = ROWS, length: int = LENGTH) -> Batch:
    """Packed rows: two documents and some padding, with unequal token weights."""
    draw = np.random.default_rng(step)
    tokens = draw.integers(0, 64, (rows, length + 1), np.int32)
    first = draw.integers(4, 10, rows)
    at = np.arange(length, dtype=np.int32)[None]
    second = at >= first[:, None]
    segments = np.where(at >= length - 2, 0, 1 + second).astype(np.int32)
    positions = np.where(second, at - first[:, None], at).astype(np.int32)
    weights = (segments > 0) * draw.uniform(0.5, 1.5, (rows, length))
    ids = np.arange(step * rows, (step + 1) * rows, dtype=np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights.astype(np.float32), positions, segments, ids)


def run(cfg, mesh_config: MeshConfig, microbatches: int = 1, rows: int = ROWS, length: int = LENGTH, **how):
    """Gradients of the first batch, the losses of three steps (with those at exits: [steps, 1 or more]), and the parameters
    behind them."""
    mesh = make_mesh(mesh_config, jax.devices()[: np.prod(list(mesh_config.sizes.values()))])
    program = build(cfg, mesh, rows=rows // microbatches, length=length, **how)
    tx = make(OPTIMISER, program.specs, steps=STEPS)
    step = chain(
        make_step(program.grad_fn, tx), accumulate(microbatches), exit_weights(cfg.exits, cfg.layers), clip_global(1.0)
    )
    # The state is made once, without a mesh, and put in place; that `init` is bitwise the same on every mesh has a test
    # of its own. Gradients come out of the very step that uses them: one program a mesh is compiled.
    places = jax.tree.map(lambda x: x.sharding, abstract_state(step, program, jax.random.key(1)))
    state = jax.device_put(fresh_state(cfg, step), places)
    put = lambda batch: jax.tree.map(lambda x: jax.device_put(x, program.batch_sharding), batch)

    @partial(jax.jit, out_shardings=(places, None, None), compiler_options=QUICK)
    def update(state, batch):
        gradients = step.gradients(state, batch, None)
        new, metrics = step.apply(state, gradients, None)
        losses = [metrics["loss"], *(each / gradients.weight_sum for each in gradients.aux.values())]
        return new, losses, gradients.mean()

    losses, first = [], None
    for i in range(STEPS):
        state, each, grads = update(state, put(batch_of(i, rows, length)))
        losses.append(list(map(float, each)))
        first = jax.device_get(grads) if first is None else first
    return first, losses, jax.device_get(state.params)


def fresh_state(cfg, step):
    params = jax.jit(decoder.init, static_argnums=0, compiler_options=QUICK)(cfg, jax.random.key(0))
    return jax.jit(step.init, compiler_options=QUICK)(params, jax.random.key(1))


@cache
def reference(name: str, rows: int = ROWS, length: int = LENGTH):
    """The run of a model on one device."""
    return run(MODELS[name], MeshConfig(), rows=rows, length=length)


TOLERANCE = {"losses": 2e-6, "gradients": 2e-5, "parameters": 2e-4}
"""Relative errors that float32 sums in another order may have."""


def errors(found, expected) -> dict[str, tuple[float, str]]:
    """The worst relative error of losses, gradients and parameters, and which tensor (or step) has it."""
    grads, losses, params = found
    off = np.abs(np.subtract(losses, expected[1])) / np.abs(expected[1])
    worst = {"losses": (float(off.max()), f"step {int(off.max(axis=1).argmax()) + 1}")}
    for name, ours, theirs in (("gradients", grads, expected[0]), ("parameters", params, expected[2])):
        # A key's bias has no gradient but rounding (the softmax takes it out): measured against the whole tree.
        least = 1e-3 * np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(theirs)))
        each = [
            (float(np.linalg.norm(a - b) / max(np.linalg.norm(b), least)), path_name(path))
            for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(ours)[0], jax.tree.leaves(theirs), strict=True)
        ]
        worst[name] = max((not np.isfinite(error), error, path) for error, path in each)[1:]
    return worst


def too_large(found, expected) -> list[str]:
    """A sentence for each error beyond its tolerance."""
    return [
        f"{name} differ: relative error {error:.1e} at {where}, at most {TOLERANCE[name]:.0e} is allowed"
        for name, (error, where) in errors(found, expected).items()
        if not error <= TOLERANCE[name]
    ]
