"""Strategies that make a lost stage anew: nothing of it survives, formulas by NumPy, all else untouched, a fresh optimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.errors import UserError
from jaxpar.recovery.base import Stages, inject
from jaxpar.recovery.checkfree import CheckFree
from jaxpar.recovery.checkfree_plus import CheckFreePlus
from jaxpar.recovery.composite import Composite
from jaxpar.recovery.copy_neighbour import CopyNeighbour
from jaxpar.recovery.random_init import RandomInit
from jaxpar.recovery.redundant import Redundant
from jaxpar.recovery.replica_peer import ReplicaPeer
from jaxpar.recovery.skip_stage import SkipStage
from jaxpar.recovery.transform import RECOVERY, kept_bytes
from jaxpar.recovery.uniform_average import UniformAverage
from jaxpar.steps.ema import averaged
from tests.recovery.small import (
    DECAY,
    RATE,
    SPECS,
    batch_at,
    failing,
    here,
    logits,
    mask,
    model_of,
    repairing,
    rows_of,
    scrambled,
    state_of,
    step_of,
    trained,
)
from tests.steps.tiny import assert_bitwise, numbers, same

NEW = [CheckFree(), CheckFreePlus(), UniformAverage(), CopyNeighbour(), RandomInit(), SkipStage()]
name = lambda strategy: type(strategy).__name__


def layers(state):
    return numbers(state.params["layers"])


# -- losing ----------------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(("stages", "lost", "ends"), [(6, (2,), True), (6, (0, 5), True), (3, (1, 2), False)])
def test_nothing_of_a_lost_stage_is_left(stages, lost, ends):
    """Parameters, moments, counts and averages; and nothing else is touched."""
    state = trained(CheckFree(), stages)
    broken = inject(model_of(state), jnp.asarray(mask(*lost, stages=stages)), here(stages), ends=ends)
    gone = {}
    for stage in range(stages):
        for path, (x, rows) in rows_of(broken, stage, ends=ends, stages=stages).items():
            if stage in lost:
                dead = np.isnan(x[rows]) if x.dtype.kind == "f" else x[rows] == np.iinfo(x.dtype).min
                assert dead.all(), path
                gone.setdefault(path, np.zeros(x.shape, bool))[rows] = True
    kinds = ("params", "mu", "nu", "count", "average")
    assert all(any(kind in path for path in gone) for kind in kinds)
    before = jax.tree_util.tree_flatten_with_path(numbers(model_of(state)))[0]
    for (path, x), y in zip(before, jax.tree.leaves(numbers(broken)), strict=True):
        alive = ~gone.get(jax.tree_util.keystr(path), np.zeros(x.shape, bool))
        np.testing.assert_array_equal(x[alive], y[alive])


@pytest.mark.parametrize("strategy", [*NEW, Redundant()], ids=name)
@pytest.mark.parametrize("stage", [0, 2])
def test_what_the_lost_stage_held_does_not_matter(strategy, stage):
    """No leak: other dead weights, moments, averages and norms give the same state, bit for bit."""
    if not strategy.recoverable(mask(stage)).any():
        stage += 1
    first = trained(strategy)
    other = scrambled(first, stage, ends=strategy.ends)
    assert not same(model_of(first), model_of(other))
    if "norms" in other.slots[RECOVERY]["of"]:
        slot = other.slots[RECOVERY]
        norms = slot["of"]["norms"].at[stage].set(99.0)
        other = other.with_slot(RECOVERY, {**slot, "of": {**slot["of"], "norms": norms}})
    failed = jnp.asarray(mask(stage))
    one, report = repairing(strategy)(first, failed)
    two, _ = repairing(strategy)(other, failed)
    assert_bitwise(one, two)
    for x in jax.tree.leaves(numbers(one)):
        assert np.isfinite(x).all()
        assert x.dtype.kind != "i" or (x > np.iinfo(x.dtype).min).all()
    np.testing.assert_array_equal(report.recovered, mask(stage))
    np.testing.assert_array_equal(report.exact, mask(stage) & strategy.exact)


@pytest.mark.parametrize("strategy", NEW, ids=name)
def test_only_the_lost_stage_changes(strategy):
    """Other stages, embedding, head, their moments and counts are bitwise what they were."""
    state = trained(strategy)
    new, _ = repairing(strategy)(state, jnp.asarray(mask(3)))
    changed = rows_of(state, 3)
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(numbers(model_of(state)))[0],
        jax.tree.leaves(numbers(model_of(new))),
        strict=True,
    ):
        alive = np.ones(x.shape, bool)
        if (key := jax.tree_util.keystr(path)) in changed:
            alive[changed[key][1]] = False
        np.testing.assert_array_equal(x[alive], y[alive], err_msg=key)
    # A second loss elsewhere and at once: the same code, other data; nothing is compiled again.
    repairing(strategy)(state, jnp.asarray(mask(1, 4)))
    assert repairing(strategy)._cache_size() == 1


def test_what_cannot_be_recovered_stays_destroyed():
    """Adjacent losses under CheckFree, in a script that nothing has checked: NaN, and the report says so."""
    new, report = repairing(CheckFree())(trained(CheckFree()), jnp.asarray(mask(0, 2, 3)))
    np.testing.assert_array_equal(report.recovered, False)
    for stage in (0, 2, 3):
        assert all(np.isnan(x[rows]).all() for x, rows in rows_of(new, stage).values() if x.dtype.kind == "f")


def test_a_composite_falls_through():
    strategy = Composite(CheckFree(), RandomInit())
    state = trained(strategy)
    alone, adjacent = jnp.asarray(mask(2)), jnp.asarray(mask(2, 3))
    assert_bitwise(
        model_of(repairing(strategy)(state, alone)[0]), model_of(repairing(CheckFree())(trained(CheckFree()), alone)[0])
    )
    assert_bitwise(
        model_of(repairing(strategy)(state, adjacent)[0]),
        model_of(repairing(RandomInit())(trained(RandomInit()), adjacent)[0]),
    )
    assert strategy.refuses(mask(2, 3)) == ""
    assert not Composite(CheckFree(), CopyNeighbour()).can_recover(mask(2, 3))
    with pytest.raises(UserError, match="cannot hold replica-peer"):
        Composite(ReplicaPeer())


# -- formulas --------------------------------------------------------------------------------------------------------------

NORMS = np.array([0.5, 2.0, 3.0, 0.25, 1.0, 4.0], np.float32)


def with_norms(strategy, stages, norms=NORMS):
    state = trained(strategy, stages)
    slot = state.slots[RECOVERY]
    kept = {**slot["of"], "norms": jnp.asarray(norms[:stages])}
    return state.with_slot(RECOVERY, {**slot, "of": kept})


def weighted(strategy, w, stage):
    """The share of the stage before, in float64."""
    w = w.astype(np.float64) ** strategy.power + strategy.epsilon
    return w[stage - 1] / (w[stage - 1] + w[stage + 1])


@pytest.mark.parametrize("stages", [6, 3])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_checkfree_is_the_weighted_average(stages, power, epsilon):
    strategy = CheckFree(power=power, epsilon=epsilon)
    state = with_norms(strategy, stages)
    each = 6 // stages
    lost = 1 if stages == 3 else 2
    new, _ = repairing(strategy, stages)(state, jnp.asarray(mask(lost, stages=stages)))
    share = weighted(strategy, NORMS[:stages], lost)
    for x, y in zip(jax.tree.leaves(layers(state)), jax.tree.leaves(layers(new)), strict=True):
        before, after = (x[(lost + d) * each : (lost + d + 1) * each].astype(np.float64) for d in (-1, 1))
        np.testing.assert_allclose(
            y[lost * each : (lost + 1) * each], share * before + (1 - share) * after, rtol=1e-6, atol=1e-7
        )


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(0, 1e6, width=32), min_size=6, max_size=6),
    st.integers(1, 4),
    st.floats(-1e3, 1e3, width=32),
)
def test_shares_are_shares(norms, stage, value):
    """Between the neighbours, the mean where both norms are equal or 0, and a fixed point where both stages are equal."""
    strategy = CheckFree()
    shares = np.asarray(strategy.shares({"norms": jnp.asarray(norms, jnp.float32)}, Stages(6, SPECS)))
    before, after = np.float32(norms[stage - 1]), np.float32(norms[stage + 1])
    assert 0 <= shares[stage] <= 1
    if before == after:
        assert shares[stage] == 0.5
    elif before == 0 or after == 0:
        assert shares[stage] == (after == 0)
    state = with_norms(strategy, 6, np.array(norms, np.float32))
    flat = jax.tree.map(lambda x: jnp.full_like(x, value), state.params["layers"])
    new, _ = repairing(strategy)(state.replace(params={**state.params, "layers": flat}), jnp.asarray(mask(stage)))
    for x in jax.tree.leaves(layers(new)):
        np.testing.assert_allclose(x, value, rtol=3e-7)


@pytest.mark.parametrize(
    ("strategy", "lost", "source"),
    [
        (CheckFreePlus(), 0, 1),
        (CheckFreePlus(), 5, 4),
        (CheckFreePlus(edge_pairs="both-ways"), 0, 1),
        (CheckFreePlus(edge_pairs="both-ways"), 1, 0),
        (CheckFreePlus(edge_pairs="both-ways"), 4, 5),
        (CheckFreePlus(edge_pairs="both-ways"), 5, 4),
        (CopyNeighbour(), 3, 2),
        (CopyNeighbour(), 0, 1),
        (CopyNeighbour(side="next"), 3, 4),
        (CopyNeighbour(side="next"), 5, 4),
    ],
)
def test_copies_are_copies(strategy, lost, source):
    """Bitwise, and beside another loss on the source's other side, whose NaN must not come along."""
    state = trained(strategy)
    third = source + (source - lost)
    other = (third,) if 0 <= third < 6 and strategy.can_recover(mask(lost, third)) else ()
    new, report = repairing(strategy)(state, jnp.asarray(mask(lost, *other)))
    for x, y in zip(jax.tree.leaves(layers(state)), jax.tree.leaves(layers(new)), strict=True):
        np.testing.assert_array_equal(y[lost], x[source])
    assert np.isfinite(report.relative_error).all()


@pytest.mark.parametrize("strategy", [CheckFreePlus(), CheckFreePlus(edge_pairs="both-ways")], ids=["edges", "both"])
def test_embedding_and_head_come_back_with_their_moments(strategy):
    """CheckFree+: bitwise, and the average with them."""
    state = trained(strategy)
    new, _ = repairing(strategy)(state, jnp.asarray(mask(0, 5)))
    assert_bitwise(
        (new.params["embedding"], new.params["head"], new.opt_state.rest),
        (state.params["embedding"], state.params["head"], state.opt_state.rest),
    )
    assert_bitwise(new.slots["ema"]["average"]["head"], state.slots["ema"]["average"]["head"])
    # They lie on the second and the last but one: lost with these, the copies are made again from what lives.
    again, _ = repairing(strategy)(*_lose(strategy, state, 1))
    assert_bitwise(again.params["embedding"], state.params["embedding"])


def _lose(strategy, state, holder):
    new, _ = repairing(strategy)(state, jnp.asarray(mask(holder)))
    assert_bitwise(new.slots[RECOVERY]["of"]["ends"], state.slots[RECOVERY]["of"]["ends"])
    return new, jnp.asarray(mask(0))


def test_the_report_of_checkfree():
    """Bytes of two neighbours with their norms; the distance from what was destroyed, by NumPy; what each keeps."""
    strategy = CheckFree()
    state = trained(strategy)
    new, report = repairing(strategy)(state, jnp.asarray(mask(1, 4)))
    stage = sum(x[0].size * 4 for x in jax.tree.leaves(layers(state)))
    assert float(report.bytes_moved) == 2 * 2 * (stage + 4)
    pick = lambda s: np.concatenate([x[1].ravel() for x in jax.tree.leaves(layers(s))]).astype(np.float64)
    error = np.linalg.norm(pick(new) - pick(state)) / np.linalg.norm(pick(state))
    np.testing.assert_allclose(report.relative_error[1], error, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(report.relative_error)[[0, 2, 3, 5]], 0)
    assert int(report.steps_lost) == 0
    assert int(new.slots[RECOVERY]["failures"]) == 2
    assert kept_bytes(state) == 6 * (4 + 4)  # two numbers a stage
    outside = sum(x.size * 4 for part in ("embedding", "head") for x in jax.tree.leaves(state.params[part]))
    assert kept_bytes(trained(CheckFreePlus())) == 6 * (4 + 4) + 4 * outside  # weights, two moments, an average


# -- the identity and the random one ----------------------------------------------------------------------------------------


@pytest.mark.quick
def test_a_skipped_stage_is_the_identity_and_learns():
    """The logits are those of the model without the stage, bitwise, and its output projection has a gradient."""
    strategy = SkipStage()
    new, _ = repairing(strategy)(trained(strategy), jnp.asarray(mask(2)))
    tokens = batch_at(0).tokens
    without = {**new.params, "layers": jax.tree.map(lambda x: jnp.delete(x, 2, axis=0), new.params["layers"])}
    np.testing.assert_array_equal(logits(new.params, tokens), logits(without, tokens))
    grads = jax.grad(lambda p: jnp.sum(logits(p, tokens) ** 2))(new.params)["layers"]
    assert np.abs(grads["out"]["kernel"][2]).max() > 0
    assert np.abs(np.asarray(new.params["layers"]["into"]["kernel"][2])).max() > 0


def test_a_random_stage_is_a_new_draw_each_time():
    strategy = RandomInit()
    state = trained(strategy)
    at = lambda s, lost: layers(repairing(strategy)(s, jnp.asarray(mask(lost)))[0])["into"]["kernel"][lost]
    assert_bitwise(at(state, 2), at(state, 2))
    draws = [
        at(state, 2),
        at(state, 3),
        at(state.replace(step=state.step + 1), 2),
        layers(state_of_init())["into"]["kernel"][2],
    ]
    for i, a in enumerate(draws):
        assert 0.3 < a.std() < 0.7  # Normal(0.5)
        assert all((a != b).all() for b in draws[:i])


def state_of_init():
    from tests.recovery.small import bare

    return state_of(bare())


# -- the optimiser ---------------------------------------------------------------------------------------------------------


def counts(state):
    found = jax.tree_util.tree_flatten_with_path(numbers(state.opt_state.stacked))[0]
    return {jax.tree_util.keystr(path): x for path, x in found if x.dtype.kind == "i"}


@pytest.mark.parametrize(
    ("options", "adam", "schedule"),
    [({}, 0, 5), ({"optimiser": "moments"}, 5, 5), ({"schedule": "restart"}, 0, 0)],
    ids=["default", "moments", "restart"],
)
def test_moments_and_counts_are_reset(options, adam, schedule):
    strategy = UniformAverage(**options)
    state, _ = repairing(strategy)(trained(strategy), jnp.asarray(mask(2)))
    for path, (x, rows) in rows_of(state, 2).items():
        if "mu" in path or "nu" in path:
            assert (x[rows] == 0).all(), path
    found = counts(state)
    assert len(found) == 2  # Adam's and the schedule's
    values = [x.tolist() for x in found.values()]
    assert values == [[5, 5, adam, 5, 5, 5], [5, 5, schedule, 5, 5, 5]]


def test_the_average_of_a_new_stage_starts_at_its_parameters():
    strategy = UniformAverage()
    state, _ = repairing(strategy)(trained(strategy), jnp.asarray(mask(2)))
    for average, p in zip(
        jax.tree.leaves(layers(state.replace(params=averaged(state, DECAY)))),
        jax.tree.leaves(layers(state)),
        strict=True,
    ):
        np.testing.assert_allclose(average[2], p[2], rtol=1e-6)
        assert (average[3] != p[3]).any()


@pytest.mark.parametrize(
    "strategy", [CheckFree(bump_mode="permanent"), CheckFree(optimiser="moments")], ids=["fresh", "moments"]
)
def test_the_first_update_is_that_of_a_fresh_adam(strategy):
    """|update| is the learning rate times the bump for every number of the new stage, and of no other: a forgotten count
    gives a third of it (bias correction with moments of 0 but a count of 6)."""
    step = step_of(strategy)
    update = jax.jit(step.update)
    state = previous = state_of(step)
    for t in range(8):
        state, _ = update(state, batch_at(8 * t), failing(2) if t == 6 else failing())
        if t == 6:
            lost = state
            # What the update added: parameters before it are the recovered ones, made again by the same program.
            start = layers(jax.jit(lambda s: step.prepare(s, batch_at(0), failing(2)))(previous)[0])
            decay = 0.1 * 1.1 * rate_at(6)  # AdamW's own, part of the update
            sizes = [
                np.abs(a - b + decay * b * (a.ndim > 2)) / (1.1 * rate_at(6))
                for a, b in zip(jax.tree.leaves(layers(lost)), jax.tree.leaves(start), strict=True)
            ]
            fresh = [np.median(x[2]) for x in sizes]
            other = [np.median(x[3]) for x in sizes]
            if strategy.optimiser == "fresh":
                np.testing.assert_allclose(np.concatenate([x[2].ravel() for x in sizes]), 1.0, rtol=5e-3)
            else:
                assert all(abs(x - 1) > 0.2 for x in fresh)
            assert all(abs(x - 1) > 0.05 for x in other)
        previous = state


def rate_at(count: int) -> float:
    from jaxpar.optimisers import schedule
    from jaxpar.optimisers_config import WarmupCosine

    return float(schedule(WarmupCosine(peak=RATE, warmup=4), 40)(count))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("permanent", [1.1, 1.1, 1.1, 1.1]),
        ("compounding", [1.1, 1.21, 1.21, 1.21]),
        ("until-steps", [1.1, 1.1, 1.0, 1.0]),  # two updates from the last loss on
    ],
)
def test_the_bump_and_its_modes(mode, expected):
    """The stage's learning rate alone, after losses in the first and second step, read from the slot and the updates."""
    strategy = UniformAverage(bump_mode=mode, bump_steps=2)
    step = step_of(strategy)
    update = jax.jit(step.update)
    state, found = state_of(step), []
    for t in range(4):
        state, _ = update(state, batch_at(8 * t), failing(2) if t < 2 else failing())
        found.append(numbers(state.slots[RECOVERY]["of"]["scale"]))
    # The slot holds what the next update takes.
    np.testing.assert_allclose([x[2] for x in found], expected, rtol=1e-6)
    np.testing.assert_array_equal(np.delete(found, 2, axis=1), 1)


def test_the_bump_multiplies_the_updates():
    """SGD: the same gradient, 1.5 times the step for the new stage, and none more for the others."""
    from jaxpar.optimisers_config import SGD, Constant

    moved = {}
    for bump in (1.0, 1.5):
        step = step_of(UniformAverage(bump=bump), optimiser=SGD(schedule=Constant(0.1), momentum=0.0))
        state = state_of(step)
        prepared, _ = jax.jit(lambda s, step=step: step.prepare(s, batch_at(0), failing(2)))(state)
        after, _ = jax.jit(step.update)(prepared, batch_at(0))
        moved[bump] = jax.tree.map(lambda a, b: a - b, layers(after), layers(prepared))
    for a, b in zip(jax.tree.leaves(moved[1.0]), jax.tree.leaves(moved[1.5]), strict=True):
        factor = np.ones(6).reshape(-1, *(1,) * (a.ndim - 1))
        factor[2] = 1.5
        np.testing.assert_allclose(b, a * factor, rtol=1e-4, atol=1e-6)


def test_the_norms_are_of_the_last_gradient():
    """By NumPy from the gradient itself; where a guard held the step back the last known ones stay."""
    from jaxpar.steps.nonfinite import skip_nonfinite
    from tests.recovery.small import grad_fn

    strategy = CheckFree()
    step = step_of(strategy, skip_nonfinite())
    update = jax.jit(step.update)
    start = state_of(step)
    state, _ = update(start, batch_at(0))
    sums = grad_fn(start.params, batch_at(0), None, None)
    squares = sum((np.asarray(g, np.float64) ** 2).reshape(6, -1).sum(1) for g in jax.tree.leaves(sums.grads["layers"]))
    np.testing.assert_allclose(
        state.slots[RECOVERY]["of"]["norms"], np.sqrt(squares) / float(sums.weight_sum), rtol=1e-5
    )
    bad = batch_at(0).replace(weights=batch_at(0).weights * jnp.nan)
    held, _ = update(state, bad)
    assert_bitwise(held.slots[RECOVERY]["of"], state.slots[RECOVERY]["of"])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: CheckFree(bump=0), ("check-free's bump = 0",)),
        (lambda: CheckFree(epsilon=-1), ("epsilon = -1",)),
        (lambda: CopyNeighbour(bump_steps=0), ("copy-neighbour's bump_steps = 0",)),
        (lambda: Stages(4, SPECS), ("6 layers", "4 equal stages", "3")),
        (lambda: step_of(CheckFree(), stages=2), ("at least 3 stages, got 2",)),
        (lambda: step_of(ReplicaPeer()), ("data axis has 1",)),
    ],
)
def test_bad_input(make, parts):
    with pytest.raises(UserError) as error:
        make()
    for part in parts:
        assert part in str(error.value)


@pytest.mark.quick
def test_the_reference_code_is_a_preset():
    code = CheckFreePlus.reference_code()
    assert (code.norm_point, code.epsilon, code.bump_mode, code.edge_pairs) == (
        "post-clip",
        1e-4,
        "permanent",
        "both-ways",
    )
    assert (CheckFree.reference_code().bump, CheckFree.reference_code(bump=1.2).bump) == (1.1, 1.2)
