"""What is compiled, read from the HLO: what recovery sends between stages, and what it adds to a step that loses nothing."""

import re

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxpar.parallel.collectives import count
from jaxpar.parallel.mesh import MeshConfig, make_mesh, mesh_sizes
from jaxpar.parallel.rules import Rules, shardings
from jaxpar.recovery.checkfree import CheckFree
from jaxpar.recovery.checkfree_plus import CheckFreePlus
from jaxpar.recovery.copy_neighbour import CopyNeighbour
from jaxpar.recovery.random_init import RandomInit
from jaxpar.recovery.redundant import Redundant
from jaxpar.recovery.skip_stage import SkipStage
from jaxpar.recovery.transform import RECOVERY, recovery_program
from jaxpar.recovery.uniform_average import UniformAverage
from jaxpar.state import state_specs
from jaxpar.step import chain
from jaxpar.steps.ema import ema
from tests.recovery.small import DECAY, LAYERS, SPECS, bare, batch_at, state_of, step_of

name = lambda strategy: type(strategy).__name__
SCALARS = 8 * LAYERS
"""Bytes of a few numbers for each stage."""


@pytest.fixture(scope="module")
def mesh(devices):
    """A stage a device."""
    return make_mesh(MeshConfig(stage=6), devices[:6])


def abstract(tree, mesh, places=None):
    whole = NamedSharding(mesh, PartitionSpec())
    places = jax.tree.map(lambda _: whole, tree) if places is None else places
    return jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p), tree, places)


def lowered(step, function, mesh, *more):
    """`function(state, batch, ...)`, with the stack's layers over the mesh's stages."""
    state = jax.eval_shape(lambda: state_of(step))
    places = shardings(state_specs(state, SPECS), mesh, Rules())
    whole = NamedSharding(mesh, PartitionSpec())
    batch = abstract(batch_at(0), mesh)
    return jax.jit(function, out_shardings=(places, whole)).lower(abstract(state, mesh, places), batch, *more)


def collectives(hlo, mesh):
    return count(hlo, mesh_sizes(mesh)).collectives


def pairs(hlo) -> list[set[tuple[int, int]]]:
    """The (source, target) devices of each permute of an array of more than one dimension: of no flags and counts."""
    line = r"\[\d+,[\d,]+\]\S* collective-permute(?:-start)?\(.*source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}"
    found = re.findall(line, hlo)
    return [{(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", one)} for one in found]


@pytest.mark.parametrize(
    "strategy",
    [CheckFree(), CheckFreePlus(), UniformAverage(), CopyNeighbour(), RandomInit(), SkipStage(), Redundant()],
    ids=name,
)
def test_recovery_sends_to_neighbours_alone(strategy, mesh):
    """Permutes by one stage, each of one leaf of one stage; nothing else but a few numbers a stage. No all-gather of
    parameters hides in it. A random stage moves nothing at all."""
    step = step_of(strategy, ema(DECAY), mesh=mesh, ema_decay=DECAY)
    failed = jax.ShapeDtypeStruct((6,), bool, sharding=NamedSharding(mesh, PartitionSpec()))
    hlo = lowered(step, recovery_program(step), mesh, failed).compile().as_text()
    found = collectives(hlo, mesh)
    leaves = {x.size * 4 // LAYERS for x in jax.tree.leaves(jax.eval_shape(lambda: state_of(step)).params["layers"])}
    large = [c for c in found if c.nbytes > SCALARS]
    assert all(c.op == "collective-permute" and c.nbytes in leaves for c in large), large
    assert len(pairs(hlo)) >= len(large)
    for moved in pairs(hlo):
        shifts = {(b - a) % 6 for a, b in moved}
        assert shifts in ({1}, {5}), moved
    # Both kernels, from both sides; a copy for Redundant: parameters, two moments, an average, put back and made again.
    expected = {"CheckFree": 4, "CheckFreePlus": 4, "UniformAverage": 4, "Redundant": 16}.get(name(strategy))
    if expected:
        assert len(large) == expected
    if isinstance(strategy, RandomInit):
        assert not large


def test_a_gather_would_be_seen(mesh):
    """So that the test above does not pass because nothing is counted: with the mean over all stages it fails."""
    step = step_of(UniformAverage(), mesh=mesh)

    def mean(state, batch):
        layers = jax.tree.map(lambda x: x.at[2].set(x.mean(0)), state.params["layers"])
        return state.replace(params={**state.params, "layers": layers}), {}

    hlo = lowered(step, mean, mesh).compile().as_text()
    assert any(c.nbytes > SCALARS and c.op != "collective-permute" for c in collectives(hlo, mesh))


def plain_text(hlo: str) -> str:
    """HLO without names of operations in the source, and with instructions and computations numbered as they come."""
    hlo = re.sub(r", metadata=\{[^}]*\}", "", hlo)
    hlo = re.sub(r"^HloModule.*$|^(FileNames|FunctionNames|FileLocations|StackFrames)(\n.+)*", "", hlo, flags=re.M)
    numbers: dict[str, str] = {}
    return re.sub(r"%[\w.-]+", lambda m: numbers.setdefault(m[0], f"%{len(numbers)}"), hlo)


def test_a_healthy_step_is_the_plain_one_but_for_the_norms(mesh):
    """CheckFree without a raised rate: drop what it keeps and tells, and the compiled program is the plain step's, line by
    line. What is dropped costs one all-gather of S numbers."""
    plain = chain(bare(), ema(DECAY))
    step = step_of(CheckFree(bump=1), ema(DECAY), mesh=mesh, ema_decay=DECAY)

    def without(state, batch):
        slot = state_of(step).slots[RECOVERY]  # constants that nothing below reads
        new, metrics = step.update(state.with_slot(RECOVERY, slot), batch)
        slots = {k: v for k, v in new.slots.items() if k != RECOVERY}
        return new.replace(slots=slots), {k: v for k, v in metrics.items() if not k.startswith(RECOVERY)}

    same = lowered(plain, plain.update, mesh).compile().as_text()
    assert plain_text(lowered(plain, without, mesh).compile().as_text()) == plain_text(same)

    whole = lowered(step, step.update, mesh).compile().as_text()
    of = lambda hlo: sorted((c.op, c.nbytes) for c in collectives(hlo, mesh))
    before, after = of(same), of(whole)
    for one in before:
        after.remove(one)
    assert after == [("all-gather", 4 * LAYERS)]


@pytest.mark.parametrize("strategy", [CheckFree(), CheckFreePlus()], ids=name)
def test_raised_rates_and_copies_of_the_ends_send_nothing_more(strategy, mesh):
    """The default: S rates multiply the updates where these are; embedding and head are everywhere anyway."""
    plain, step = chain(bare(), ema(DECAY)), step_of(strategy, ema(DECAY), mesh=mesh, ema_decay=DECAY)
    large = lambda s: sorted(
        (c.op, c.nbytes)
        for c in collectives(lowered(s, s.update, mesh).compile().as_text(), mesh)
        if c.nbytes > SCALARS
    )
    assert large(step) == large(plain)
