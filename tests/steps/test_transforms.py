"""What each step transform does, on numbers that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpar.errors import UserError
from jaxpar.optimisers_config import SGD, Constant
from jaxpar.step import Control, Gradients, chain
from jaxpar.steps.accumulate import accumulate
from jaxpar.steps.clip import clip_global, clip_per_stage, stage_of
from jaxpar.steps.config import StepConfig
from jaxpar.steps.ema import averaged, ema
from jaxpar.steps.nonfinite import skip_nonfinite, stop_on_nonfinite
from jaxpar.steps.spikes import skip_spikes
from tests.steps.tiny import assert_bitwise, bare, batch_of, grad_fn, numbers, params, state_of

pytestmark = pytest.mark.quick
SIMPLE = SGD(schedule=Constant(0.1), momentum=0.0)


def gradients_of(value: float, *, loss: float = 1.0, weight: float = 1.0) -> Gradients:
    """Every entry of the summed gradient is `value`."""
    return Gradients(jnp.float32(loss), jnp.float32(weight), jax.tree.map(lambda p: jnp.full_like(p, value), params()))


def wrap(*transforms, gradients=grad_fn):
    return chain(bare(SIMPLE, gradients), *transforms)


def follow(step, sequence, state=None):
    """States and metrics after each of these gradients."""
    state, apply, out = state_of(step) if state is None else state, jax.jit(step.apply), []
    for g in sequence:
        state, metrics = apply(state, g, Control())
        out.append((state, {k: float(v) for k, v in metrics.items()}))
    return out


def test_accumulation_is_the_whole_batch():
    """Against a loop over single tokens' losses in float64, with a row of no weight and unequal ones."""
    batch, weights = batch_of(0), jnp.linspace(0.0, 2.0, 8)
    state = state_of(wrap())
    found = {
        n: jax.jit(wrap(accumulate(n)).gradients)(state, batch, Control(sample_weights=weights)) for n in (1, 2, 4, 8)
    }
    for n in (2, 4, 8):
        for a, b in zip(jax.tree.leaves(found[n]), jax.tree.leaves(found[1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), numbers(state.params))
    total, weight = 0.0, 0.0
    w = np.asarray(batch.weights, np.float64) * np.asarray(weights, np.float64)[:, None]
    for row in range(8):
        for t in range(5):
            h = np.sin(float(batch.tokens[row, t]) * np.arange(1.0, 5.0))
            for layer in range(3):
                kernel = p["layers"]["a"]["kernel"][layer]
                h = h + np.tanh((h * p["layers"]["norm"]["scale"][layer]) @ kernel) @ kernel.T
            total += w[row, t] * np.sum((h @ p["head"]["kernel"] - float(batch.targets[row, t])) ** 2)
            weight += w[row, t]
    np.testing.assert_allclose(found[4].loss_sum, total, rtol=1e-5)
    np.testing.assert_allclose(found[4].weight_sum, weight, rtol=1e-6)
    # Not the mean of the microbatches' means, which unequal weights make another number.
    halves = [wrap().gradients(state, jax.tree.map(lambda x, i=i: x[i::2], batch), None) for i in range(2)]
    whole = wrap().gradients(state, batch, None)
    mean_of_means = sum(g.loss_sum / g.weight_sum for g in halves) / 2
    assert abs(mean_of_means - whole.loss_sum / whole.weight_sum) > 1e-3


def test_accumulation_of_rows_that_do_not_divide():
    step = wrap(accumulate(3))
    with pytest.raises(UserError, match="8 rows are not divisible into 3 microbatches; choose a batch of 6 or 9 rows"):
        jax.eval_shape(step.update, state_of(step), batch_of(0))


def test_nan_in_one_microbatch_stops():
    step = wrap(accumulate(4), stop_on_nonfinite())
    before = state_of(step)
    after, metrics = jax.jit(step.update)(before, batch_of(0, nan=True))
    assert float(metrics["stop_on_nonfinite/stopped"]) == 1
    assert_bitwise(after.params, before.params)


@pytest.mark.parametrize(
    "bad",
    [
        gradients_of(np.nan),
        gradients_of(np.inf),
        gradients_of(1.0, loss=np.nan),
        gradients_of(1.0, weight=np.inf),
        gradients_of(3e38, weight=1e-6),  # finite sums, but the mean and so the update is not
    ],
    ids=["nan", "inf", "loss", "weight", "update"],
)
def test_stop_keeps_the_state(bad):
    step = wrap(skip_spikes(), ema(0.9), stop_on_nonfinite())
    good = gradients_of(1.0)
    trace = follow(step, [good, bad, good, good])
    assert [m["stop_on_nonfinite/stopped"] for _, m in trace] == [0, 1, 1, 1]
    (first, _), *rest = trace
    for state, _ in rest:
        assert_bitwise(state.with_slot("stop_on_nonfinite", jnp.asarray(False)), first)
        assert int(state.step) == 1


def test_skip_leaves_the_optimizer_and_counts():
    step = wrap(skip_nonfinite(1))
    good, bad = gradients_of(1.0), gradients_of(np.nan)
    trace = follow(step, [good, bad, good, bad, bad, good])
    assert [m["skip_nonfinite/skipped"] for _, m in trace] == [0, 1, 0, 1, 1, 0]
    assert [m["skip_nonfinite/total"] for _, m in trace] == [0, 1, 1, 2, 3, 3]
    assert [m["skip_nonfinite/stopped"] for _, m in trace] == [0, 0, 0, 0, 1, 0]
    states = [s for s, _ in trace]
    assert [int(s.step) for s in states] == [1, 2, 3, 4, 5, 6]
    assert_bitwise((states[1].params, states[1].opt_state), (states[0].params, states[0].opt_state))
    only = follow(step, [good] * 3)
    assert_bitwise((states[5].params, states[5].opt_state), (only[2][0].params, only[2][0].opt_state))


def losses(step, values):
    return follow(step, [gradients_of(0.1, loss=v) for v in values])


def skipped(trace):
    return [int(m["skip_spikes/skipped"]) for _, m in trace]


def test_spikes_on_known_numbers():
    """Mean 2 and deviation 1: with sigma 2 the limit is above 4."""
    for value, skips in ((3.99, 0), (4.01, 1), (-50.0, 0)):
        trace = losses(wrap(skip_spikes(2.0, 4)), [1.0, 3.0, 1.0, 3.0, value])
        assert skipped(trace)[4] == skips
        window = sorted(float(x) for x in trace[-1][0].slots["skip_spikes"]["losses"])
        assert (np.float32(value) in window) == (not skips)


def test_spikes_in_the_gradient_norm():
    trace = follow(wrap(skip_spikes(2.0, 4)), [gradients_of(v) for v in (1.0, 1.1, 1.0, 1.1, 5.0, 1.0)])
    assert skipped(trace) == [0, 0, 0, 0, 1, 0]
    assert_bitwise(trace[4][0].params, trace[3][0].params)


def test_spikes_wait_for_half_the_window():
    assert skipped(losses(wrap(skip_spikes(2.0, 8)), [1.0, 1.1, 100.0, 1.0, 1e6])) == [0, 0, 0, 0, 1]


def test_a_lasting_change_of_level_is_taken():
    trace = losses(wrap(skip_spikes(2.0, 4, 2)), [1.0, 1.1, 1.0, 1.1, 50.0, 50.0, 50.0, 1.0])
    assert skipped(trace) == [0, 0, 0, 0, 1, 1, 0, 0]
    slot = trace[6][0].slots["skip_spikes"]
    assert 50.0 in np.asarray(slot["losses"])
    assert int(slot["total"]) == 2
    assert int(slot["consecutive"]) == 0


def test_nan_is_no_spike_and_never_enters():
    trace = losses(wrap(skip_spikes(2.0, 4)), [1.0, 1.1, np.nan, 1.0, 1.1, 100.0])
    assert skipped(trace) == [0, 0, 0, 0, 0, 1]
    assert np.isfinite(trace[-1][0].slots["skip_spikes"]["losses"]).all()
    assert int(trace[-1][0].slots["skip_spikes"]["count"]) == 4


@pytest.mark.parametrize("limit", [0.5, 1e3])
def test_clip_is_optax(limit):
    g = wrap().gradients(state_of(wrap()), batch_of(0), None)
    ((state, metrics),) = follow(wrap(clip_global(limit)), [g])
    mean = g.mean()
    clipped, _ = optax.clip_by_global_norm(limit).update(mean, optax.EmptyState())
    for new, old, c in zip(*map(jax.tree.leaves, (state.params, params(), clipped)), strict=True):
        np.testing.assert_allclose(new, old - 0.1 * c, rtol=1e-5, atol=1e-6)
    assert metrics["clip_global/factor"] == pytest.approx(min(1.0, limit / float(optax.tree.norm(mean))), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(clipped)), rel=1e-5)


def test_clip_per_stage_with_uneven_stages():
    """Three layers in two stages (2 + 1), and what is outside the stack by itself."""
    assert stage_of(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    draw = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(draw.normal(size=p.shape), jnp.float32), params())
    grads["head"] = jax.tree.map(lambda g: 1e-3 * g, grads["head"])
    scale = jnp.asarray([1.0, 1.0, 1e-3])
    grads["layers"] = jax.tree.map(lambda g: g * scale.reshape(-1, *(1,) * (g.ndim - 1)), grads["layers"])
    g = Gradients(jnp.float32(1.0), jnp.float32(2.0), grads)
    ((state, metrics),) = follow(wrap(clip_per_stage(0.5, 2)), [g])
    moved = jax.tree.map(lambda new, old: np.asarray(old - new, np.float64) / 0.1, state.params, params())
    norm = lambda trees: np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in trees))
    part = lambda tree, s: [x[s] for x in jax.tree.leaves(tree["layers"])]
    assert norm(part(moved, slice(0, 2))) == pytest.approx(0.5, rel=1e-4)
    assert norm(part(moved, slice(2, 3))) == pytest.approx(norm(part(grads, slice(2, 3))) / 2, rel=1e-2)
    assert norm(jax.tree.leaves(moved["head"])) == pytest.approx(norm(jax.tree.leaves(grads["head"])) / 2, rel=1e-2)
    assert metrics["clip_per_stage/smallest_factor"] == pytest.approx(1.0 / norm(part(grads, slice(0, 2))), rel=1e-4)


def test_more_stages_than_layers():
    step = wrap(clip_per_stage(1.0, 4))
    with pytest.raises(UserError, match="4 stages, but the model has 3 layers"):
        jax.eval_shape(step.apply, state_of(step), gradients_of(1.0), Control())


def test_ema_in_closed_form():
    """(1 - d) Σ d^(n-i) p_i / (1 - d^n); a step that was skipped does not count."""
    step, d = wrap(skip_nonfinite(), ema(0.5)), 0.5
    start = state_of(step)
    assert_bitwise(averaged(start, d), start.params)
    trace = follow(step, [gradients_of(v) for v in (1.0, 2.0, np.nan, 3.0)])
    assert [m["ema/count"] for _, m in trace] == [1, 2, 2, 3]
    for x, y in zip(jax.tree.leaves(averaged(trace[0][0], d)), jax.tree.leaves(trace[0][0].params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    taken = [trace[i][0].params for i in (0, 1, 3)]
    expected = jax.tree.map(lambda a, b, c: (0.125 * a + 0.25 * b + 0.5 * c) / 0.875, *taken)
    for x, y in zip(jax.tree.leaves(averaged(trace[3][0], d)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_control_is_data():
    step = wrap()
    state, update = state_of(step), jax.jit(step.update)
    weights = jnp.asarray([0.0, 1.0, 2.0, 0.5, 1.0, 1.0, 3.0, 0.0])
    scaled, _ = update(state, batch_of(0), Control(weights))
    batch = batch_of(0)
    by_hand, _ = update(state, batch.replace(weights=batch.weights * weights[:, None]), None)
    for a, b in zip(jax.tree.leaves(scaled.params), jax.tree.leaves(by_hand.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    plain, _ = update(state, batch, None)
    rates, _ = update(state, batch, Control(learning_rate_scale=jnp.asarray([0.0, 1.0, 2.0])))
    for new, old, one in zip(*(jax.tree.leaves(s.params["layers"]) for s in (rates, state, plain)), strict=True):
        np.testing.assert_array_equal(new[0], old[0])
        np.testing.assert_allclose(new[1], one[1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(new[2] - old[2], 2 * (one[2] - old[2]), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(rates.params["head"]["kernel"], plain.params["head"]["kernel"], rtol=1e-5, atol=1e-6)
    assert int(plain.data_position) == 8


def test_a_batch_without_weights_changes_nothing():
    step = wrap()
    state = state_of(step)
    new, metrics = jax.jit(step.update)(state, batch_of(0).replace(weights=jnp.zeros((8, 5))))
    assert float(metrics["tokens"]) == 0
    assert_bitwise(new.params, state.params)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: accumulate(0), "at least 1 microbatch, got 0"),
        (lambda: StepConfig(accumulate=0), "step.accumulate = 0"),
        (lambda: clip_global(0.0), "norm above 0, got 0.0"),
        (lambda: clip_global(float("inf")), "got inf"),
        (lambda: clip_global(float("nan")), "got nan"),
        (lambda: clip_per_stage(-1.0, 2), "got -1.0"),
        (lambda: clip_per_stage(1.0, 0), "at least 1 stage, got 0"),
        (lambda: skip_nonfinite(-1), "max_consecutive = -1"),
        (lambda: skip_spikes(sigma=0.0), "sigma = 0.0"),
        (lambda: skip_spikes(window=3), "window = 3 must be at least 4"),
        (lambda: skip_spikes(max_consecutive=0), "max_consecutive = 0"),
        (lambda: ema(1.0), r"decay = 1.0 is outside \[0, 1\)"),
    ],
)
def test_bad_options(make, match):
    with pytest.raises(UserError, match=match):
        make()
