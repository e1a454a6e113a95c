"""The laws of step transforms (`jaxpar.steps`), each for every transform. A new transform is a new row of TRANSFORMS."""

import itertools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpar.steps
from jaxpar.checkpoint import Checkpoints
from jaxpar.checkpoint_arrays import flatten
from jaxpar.models.config import ModelConfig
from jaxpar.optimisers import make
from jaxpar.optimisers_config import SGD, AdamW, Constant
from jaxpar.parallel.mesh import MeshConfig, make_mesh
from jaxpar.parallel.rules import Rules, batch_sharding
from jaxpar.program import build
from jaxpar.recovery.base import Stages
from jaxpar.recovery.checkfree import CheckFree
from jaxpar.recovery.transform import recovering
from jaxpar.state import abstract_state
from jaxpar.step import Control, chain
from jaxpar.steps.accumulate import accumulate
from jaxpar.steps.base import make_step
from jaxpar.steps.clip import clip_global, clip_per_stage
from jaxpar.steps.config import Ema, SkipSpikes, StepConfig
from jaxpar.steps.ema import ema
from jaxpar.steps.nonfinite import skip_nonfinite, stop_on_nonfinite
from jaxpar.steps.spikes import skip_spikes
from tests.steps.tiny import (
    ROWS,
    SPECS,
    STEPS,
    assert_bitwise,
    bare,
    batch_of,
    grad_fn,
    numbers,
    params,
    run,
    same,
    state_of,
    wrapped,
)

# name: (the transform where it acts, the same where its trigger never fires)
TRANSFORMS = {
    "accumulate": (accumulate(2), accumulate(1)),
    "clip_global": (clip_global(0.5), clip_global(1e6)),
    "clip_per_stage": (clip_per_stage(0.4, 2), clip_per_stage(1e6, 2)),
    "stop_on_nonfinite": (stop_on_nonfinite(), stop_on_nonfinite()),
    "skip_nonfinite": (skip_nonfinite(2), skip_nonfinite(2)),
    "skip_spikes": (skip_spikes(4.0, 4, 2), skip_spikes(1e6, 4, 2)),
    "ema": (ema(0.9), ema(0.9)),
    "recovery": (recovering(CheckFree(), Stages(3, SPECS)), recovering(CheckFree(), Stages(3, SPECS))),
}
PAIRS = list(itertools.combinations(TRANSFORMS, 2))
# Spikes once the window of 4 is half full, then what is not finite, then on.
EVENTFUL = [batch_of(0), batch_of(1), batch_of(2, target=500), batch_of(3, nan=True), batch_of(4)]
CALM = [batch_of(i) for i in range(STEPS)]
LOST = [Control(failed=jnp.asarray([False, step in (1, 3), False])) for step in range(len(EVENTFUL))]
# Without fusion each operation is rounded by itself, so that equal arithmetic gives equal bits.
UNFUSED = {"xla_disable_hlo_passes": "fusion"}
each = pytest.mark.parametrize("name", TRANSFORMS)

_results = {}


def once(key, make):
    if key not in _results:
        _results[key] = make()
    return _results[key]


def acting(name):
    return once(("acting", name), lambda: run(wrapped(TRANSFORMS[name][0]), EVENTFUL, controls=controls(name)))


def controls(name):
    """What makes a transform act on `EVENTFUL` beside the batches."""
    return LOST if name == "recovery" else [None] * len(EVENTFUL)


@each
def test_a_quiet_transform_changes_nothing(name):
    """Law 1."""
    expected, _ = once("unfused", lambda: run(bare(), CALM, options=UNFUSED))
    found, _ = run(wrapped(TRANSFORMS[name][1]), CALM, options=UNFUSED)
    for a, b in zip(found, expected, strict=True):
        assert_bitwise(
            (a.params, a.opt_state, a.step, a.data_position), (b.params, b.opt_state, b.step, b.data_position)
        )


@pytest.mark.quick
@each
def test_a_quiet_transform_changes_nothing_that_fusion_would_not(name):
    """Law 1, compiled as runs are."""
    expected, _ = once("fused", lambda: run(bare(), CALM))
    found, _ = run(wrapped(TRANSFORMS[name][1]), CALM)
    for a, b in zip(
        jax.tree.leaves(numbers(found[-1].params)), jax.tree.leaves(numbers(expected[-1].params)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(TRANSFORMS) - {"accumulate", "ema"}))
def test_an_acting_transform_changes_something(name):
    """So that law 1 does not hold because nothing is there. (Accumulation and an average never change the updates.)"""
    expected, _ = once("eventful", lambda: run(bare(), EVENTFUL))
    assert not all(same(a.params, b.params) for a, b in zip(acting(name)[0], expected, strict=True))


@each
def test_donation(name):
    """Law 2: the state goes in and out with the same structure, dtypes and places, and its buffers are used again."""
    step = wrapped(TRANSFORMS[name][0])
    update = jax.jit(step.update, donate_argnums=0)
    state = step.init(params(), jax.random.key(1))  # not jitted: nothing may stand in it twice
    for batch, control, expected in zip(EVENTFUL, controls(name), acting(name)[0], strict=True):
        old, (state, _) = state, update(state, batch, control)
        assert all(x.is_deleted() for x in jax.tree.leaves(old.params))
        assert_bitwise(state, expected)
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, old)


@each
def test_checkpoints_on_other_meshes(name, devices, tmp_path):
    """Law 3: saved on eight devices in the middle, restored on one (and back), it goes on as if nothing had been."""
    step = wrapped(TRANSFORMS[name][0])
    meshes = {
        "eight": make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices),
        "one": make_mesh(MeshConfig(), devices[:1]),
    }
    for first, second in (("eight", "one"), ("one", "eight")):
        states, position = {}, 3
        for mesh in (first, second):
            program = SimpleNamespace(specs=SPECS, mesh=meshes[mesh], rules=Rules())
            target = abstract_state(step, program, jax.random.key(1))
            if mesh == first:
                source = acting(name)[0][position - 1]
                states[mesh] = jax.device_put(source, jax.tree.map(lambda x: x.sharding, target))
                checkpoints = Checkpoints(tmp_path / first, config={"model": {}}, say=print)
                checkpoints.save(states[mesh], finite=True)
                checkpoints.close()
            else:
                checkpoints = Checkpoints(tmp_path / first, config={"model": {}}, say=print)
                states[mesh], _ = checkpoints.restore(target)
                checkpoints.close()
                assert jax.tree.map(lambda x: x.sharding, states[mesh]) == jax.tree.map(lambda x: x.sharding, target)
        assert_bitwise(*states.values())
        if second == "one":  # the mesh of the run that was never interrupted: bitwise the same from here on
            restored = jax.device_put(states["one"], devices[0])
            rest = run(step, EVENTFUL[position:], restored, controls(name)[position:])
            assert_bitwise(rest[0][-1], acting(name)[0][-1])
        else:
            put = lambda x: jax.device_put(x, batch_sharding(meshes["eight"], Rules()))
            last = controls(name)[-1:]
            found = run(step, [jax.tree.map(put, EVENTFUL[-1])], states["eight"], last)[0][-1]
            expected = run(step, EVENTFUL[-1:], acting(name)[0][position - 1], last)[0][-1]
            for a, b in zip(jax.tree.leaves(numbers(found)), jax.tree.leaves(numbers(expected)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.quick
@each
def test_no_host_sync(name):
    """Law 4: nothing goes between host and device, and the program calls nothing on the host."""
    step = wrapped(TRANSFORMS[name][0])
    state = state_of(step)
    update = jax.jit(step.update)
    jaxpr = str(jax.make_jaxpr(step.update)(state, EVENTFUL[0], controls(name)[0]))
    assert "callback" not in jaxpr
    with jax.transfer_guard("disallow"):
        for batch, control in zip(EVENTFUL[:2], controls(name), strict=False):
            state, _ = update(state, batch, control)


@pytest.mark.quick
def test_a_transfer_would_be_seen():
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed"):
        jax.jit(lambda x: x + 1)(np.ones(3))


@pytest.mark.quick
@each
def test_metrics_are_added_under_the_own_name(name):
    """Law 5."""

    def shapes(step, control):
        state = jax.eval_shape(step.init, params(), jax.random.key(0))
        return jax.eval_shape(step.update, state, EVENTFUL[0], control)[1]

    before, after = shapes(bare(), None), shapes(wrapped(TRANSFORMS[name][0]), controls(name)[0])
    assert set(before) <= set(after)
    assert all(new.startswith(f"{name}/") for new in set(after) - set(before))
    assert all(value.shape == () and value.dtype == jnp.float32 for value in after.values())


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_the_order_changes_no_layout(a, b):
    """Law 6: slots and a checkpoint's leaves are the same in both orders, and each transform's slot is its own."""

    def layout(*names):
        step = wrapped(*(TRANSFORMS[name][0] for name in names))
        state = jax.eval_shape(step.init, params(), jax.random.key(0))
        return jax.tree.structure(state), {path: (x.shape, x.dtype) for path, x in flatten(state).items()}

    assert layout(a, b) == layout(b, a)
    slots = lambda *names: {path for path in layout(*names)[1] if path[0] == "slots"}
    assert slots(a, b) == slots(a) | slots(b)


def documented() -> set[frozenset]:
    rows = re.findall(r"^    (\w+) / (\w+)  ", jaxpar.steps.__doc__, flags=re.MULTILINE)
    return {frozenset(row) for row in rows}


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_the_table_of_orders_is_true(a, b):
    """Law 6: a pair differs on an eventful run exactly if the table says so."""
    assert len(documented()) == 8
    steps = [
        chain(bare(SGD(schedule=Constant(0.01))), *(TRANSFORMS[name][0] for name in names))
        for names in ((a, b), (b, a))
    ]
    if "accumulate" in (a, b):  # the only one that wraps another phase: the very same program
        one, other = (
            str(jax.make_jaxpr(step.update)(step.init(params(), jax.random.key(0)), CALM[0])) for step in steps
        )
        assert one == other
        return
    # The same gradients for all, so that only `apply` is compiled; an infinite one at the end, after some in a row.
    batches = [*EVENTFUL[:4], EVENTFUL[3], EVENTFUL[2], EVENTFUL[4]]
    gradients = [
        once(("gradients", id(batch)), lambda batch=batch: grad_fn(params(), batch, None, None)) for batch in batches
    ]
    infinite = gradients[2].replace(loss_sum=jnp.float32(jnp.inf))
    traces = []
    for step in steps:
        update, state, trace = jax.jit(step.apply, compiler_options=UNFUSED), step.init(params(), jax.random.key(0)), []
        for g in [*gradients[:5], infinite, *gradients[5:]]:
            state, _ = update(state, g, Control())
            trace.append(state)
        traces.append(trace)
    assert all(map(same, *traces)) == (frozenset((a, b)) not in documented())


def test_everything_on_around_the_decoder():
    """The order of `StepConfig` on a real model, donated: a step that is not finite stops it with its state whole."""
    cfg = ModelConfig(vocabulary=16, layers=2, width=8, heads=2, kv_heads=1, head_size=4, hidden=16)
    program = build(cfg, make_mesh(MeshConfig(), jax.devices()[:1]), rows=ROWS // 2)
    config = StepConfig(accumulate=2, spikes=SkipSpikes(window=64), ema=Ema(0.9))
    tx = make(AdamW(schedule=Constant(0.01)), program.specs, steps=10)
    step = chain(make_step(program.grad_fn, tx), *config.transforms())
    state = jax.jit(step.init)(program.init(jax.random.key(0)), jax.random.key(1))
    update = jax.jit(step.update, donate_argnums=0)
    clamp = lambda b: b.replace(tokens=b.tokens % 16, targets=b.targets % 16)
    losses = []
    for i in range(3):
        state, metrics = update(state, clamp(batch_of(0)))
        losses.append(float(metrics["loss"]))
        assert float(metrics["ema/count"]) == i + 1
    assert losses[2] < losses[1] < losses[0]
    before = numbers(state)
    state, metrics = update(state, clamp(batch_of(3, nan=True)))
    assert float(metrics["stop_on_nonfinite/stopped"]) == 1
    # The slot of the average is outside the guard and sees that nothing has moved.
    assert bool(state.slots["stop_on_nonfinite"])
    state = state.with_slot("stop_on_nonfinite", jnp.asarray(False)).replace(data_position=before.data_position)
    assert_bitwise(state, before)
