"""Strategies that bring back what was lost: the trajectory is, bit for bit, that of a run that lost nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.parallel.mesh import MeshConfig, make_mesh
from jaxpar.parallel.rules import Rules, shardings
from jaxpar.recovery.base import Stages, inject
from jaxpar.recovery.composite import Composite
from jaxpar.recovery.failures import FailureTrace
from jaxpar.recovery.no_failure import NoFailure
from jaxpar.recovery.plan import walk
from jaxpar.recovery.redundant import Redundant
from jaxpar.recovery.replica_peer import ReplicaPeer
from jaxpar.recovery.snapshot import Snapshot
from jaxpar.recovery.transform import RECOVERY, kept_bytes, recovery_program
from jaxpar.state import state_specs
from jaxpar.step import chain
from jaxpar.steps.ema import ema
from tests.recovery.small import (
    DECAY,
    SPECS,
    bare,
    batch_at,
    failing,
    here,
    mask,
    model_of,
    repairing,
    rows_of,
    state_of,
    step_of,
    train,
    trained,
)
from tests.steps.tiny import assert_bitwise, numbers

STEPS = 12


@pytest.fixture(scope="module")
def uninterrupted():
    return numbers(train(chain(bare(), ema(DECAY)), STEPS))


def listed(*events):
    return FailureTrace(6, (0.0,) * 6, listed=frozenset(events))


def drive(strategy, trace, stages: int = 6):
    """As the loop does: mend what was lost, then take the batch that the state asks for. Counts iterations."""
    step = step_of(strategy, ema(DECAY), stages=stages, ema_decay=DECAY)
    update, repair = jax.jit(step.update), jax.jit(recovery_program(step))
    state, iterations = state_of(step), 0
    while int(state.step) < STEPS:
        iterations += 1
        lost = trace.lost(iterations)
        if lost.any():
            state, metrics = repair(state, batch_at(int(state.data_position)), jnp.asarray(lost))
            assert float(metrics[f"{RECOVERY}/exact"]) == float(metrics[f"{RECOVERY}/lost"]) == lost.sum()
            assert float(metrics[f"{RECOVERY}/relative_error"]) == 0
            if int(state.step) + int(state.slots[RECOVERY]["replayed"]) == iterations:
                continue  # it went back: this iteration is over
        state, _ = update(state, batch_at(int(state.data_position)))
    return state, iterations


@pytest.mark.quick
@pytest.mark.parametrize(
    ("strategy", "trace"),
    [
        # All stages, edges too; two at once; the same again at once.
        (Redundant(), listed(*((2 + s, s) for s in range(6)), (9, 0), (9, 2), (9, 4), (10, 1), (10, 5))),
        (Snapshot(3), FailureTrace.bernoulli(0.05, 6, seed=4)),
        # Neighbours too, and all of them at the very first step.
        (Snapshot(3), listed(*((1, s) for s in range(6)), (8, 2), (8, 3), (12, 0))),
        (Composite(Redundant(), Snapshot(2)), FailureTrace.bernoulli(0.08, 6, seed=11)),
    ],
    ids=["redundant", "snapshot drawn", "snapshot all", "composite"],
)
def test_the_trajectory_is_that_without_failures(strategy, trace, uninterrupted):
    """Parameters, moments, counts, averages, step and position; in as many iterations as the plan says."""
    state, iterations = drive(strategy, trace)
    assert_bitwise(model_of(state), uninterrupted)
    plan = walk(strategy, trace, STEPS)
    assert plan.losses > 3
    assert iterations == plan.iterations
    assert int(state.slots[RECOVERY]["failures"]) == plan.losses
    assert int(state.slots[RECOVERY]["replayed"]) == plan.iterations - STEPS


@pytest.mark.quick
def test_without_recovery_a_lost_stage_is_the_end_of_the_run():
    """The trap that every other test leans on: what is lost is NaN, and one step spreads it everywhere."""
    step = step_of(NoFailure())
    update = jax.jit(step.update)
    state, metrics = update(state_of(step), batch_at(0), failing(3))
    assert np.isnan(metrics["loss"])
    assert float(metrics[f"{RECOVERY}/unrecovered"]) == 1
    assert all(np.isnan(x).any() for x in jax.tree.leaves(numbers(state.params)))


def test_a_copy_that_was_lost_with_its_holder_does_not_come_back():
    """Redundant, adjacent stages 2 and 3: the second one's copy lay on the first."""
    state = trained(Redundant())
    new, report = repairing(Redundant())(state, jnp.asarray(mask(2, 3)))
    np.testing.assert_array_equal(report.recovered, mask(2))
    np.testing.assert_array_equal(report.exact, mask(2))
    old = rows_of(state, 2)
    for path, (x, rows) in rows_of(new, 2).items():
        np.testing.assert_array_equal(x[rows], old[path][0][rows])
    assert all(np.isnan(x[rows]).all() for x, rows in rows_of(new, 3).values() if x.dtype.kind == "f")
    # Nor from what is kept: after this the copy of stage 3 is that of what is left of it.
    assert np.isnan(report.relative_error[3])


def test_what_exact_strategies_keep_and_move():
    """Bytes by hand: a copy is all that stages hold; a rollback moves all of it once, however many were lost."""
    state = trained(Redundant())
    bare_state = model_of(state)
    rows = [rows_of(bare_state, s, ends=True) for s in range(6)]
    nbytes = lambda stage: sum(x[r].nbytes for x, r in rows[stage].values())
    everything = sum(map(nbytes, range(6)))
    assert kept_bytes(state) == everything
    _, report = repairing(Redundant())(state, jnp.asarray(mask(0, 3)))
    assert float(report.bytes_moved) == nbytes(0) + nbytes(3)
    snapshot = trained(Snapshot(3))
    scalars = sum(x.nbytes for x in jax.tree.leaves(numbers(snapshot.slots[RECOVERY]["of"]))) - everything
    assert 0 < scalars <= 24  # the step, the position in the data, counts of what is outside the stack
    _, report = repairing(Snapshot(3))(snapshot, jnp.asarray(mask(0, 3)))
    assert float(report.bytes_moved) == everything
    assert int(report.steps_lost) == 5 - 5  # made from the state as it was


# -- a replica of the same stage -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replicas(devices):
    """A trained state on a mesh with two replicas of three stages each, and its stages."""
    mesh = make_mesh(MeshConfig(data=2, stage=3), devices[:6])
    state = trained(ReplicaPeer())
    places = shardings(state_specs(state, SPECS), mesh, Rules())
    inner = here()
    return jax.device_put(state, places), Stages(6, SPECS, mesh, ema_decay=DECAY, init=inner.init)


def by_replica(x, mesh):
    """[R, ...]: the array as each replica's devices hold it."""
    copies = np.full((2, *x.shape), -1, x.dtype)
    for shard in x.addressable_shards:
        where = np.argwhere(mesh.devices == shard.device)[0][mesh.axis_names.index("data")]
        copies[(int(where), *shard.index)] = np.asarray(shard.data)
    return copies


@pytest.mark.parametrize("lost", [(0,), (5, 2), (1, 2)])
def test_a_replica_loses_a_stage_and_its_peer_gives_it_back(replicas, lost):
    """The devices of one replica alone hold NaN in what was lost, and afterwards hold what they held before."""
    state, stages = replicas
    strategy, failed = ReplicaPeer(), jnp.asarray(mask(*lost))
    broken = jax.jit(lambda s, f: strategy.destroy(s, f, stages))(model_of(state), failed)
    dead = {stage: (int(state.step) + stage) % 2 for stage in lost}
    for name in ("into", "out"):
        copies = by_replica(broken.params["layers"][name]["kernel"], stages.mesh)
        gone = np.isnan(copies).reshape(2, 6, -1)
        assert (gone.all(-1) == gone.any(-1)).all()
        assert {(int(s), int(r)) for r, s in np.argwhere(gone.all(-1))} == set(dead.items())
    tokens = np.isnan(by_replica(broken.params["embedding"]["tokens"], stages.mesh)).reshape(2, -1).all(-1)
    assert tokens.tolist() == [dead.get(0) == 0, dead.get(0) == 1]

    from jaxpar.recovery.transform import repair

    new, report = jax.jit(lambda s, f: repair(strategy, stages, s, f))(state, failed)
    for a, b in zip(jax.tree.leaves(model_of(new)), jax.tree.leaves(model_of(state)), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = by_replica(a, stages.mesh), by_replica(b, stages.mesh)
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(report.exact, mask(*lost))


def test_inject_compiles_to_selects_alone():
    """Losing is data: no branch, no copy to the host, the same program whatever is lost."""
    state = model_of(trained(Redundant()))
    jaxpr = str(jax.make_jaxpr(lambda s, f: inject(s, f, here(), ends=True))(state, jnp.asarray(mask(0))))
    assert "cond" not in jaxpr
    assert "callback" not in jaxpr
