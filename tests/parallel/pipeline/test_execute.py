"""The executors: any table gives the loss and gradients of the model without a pipeline, in bounded memory."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxpar.parallel.pipeline import autodiff
from jaxpar.parallel.pipeline.branches import divergent_permutes, inner_jaxprs, permutes
from jaxpar.parallel.pipeline.execute import Parts, executor_for, gradients
from jaxpar.parallel.pipeline.orders import make
from jaxpar.parallel.pipeline.table import compile_table

P = PartitionSpec
WIDTH, ROWS = 8, 2


def first(shared, micro):
    return {"x": shared["in"][micro["ids"]]}


def middle(layer, state, piece, micro):
    # The norm is NaN at zero, which idle devices compute on: their nonsense must not reach a sum.
    x = state["x"] / jnp.linalg.norm(state["x"], axis=-1, keepdims=True)
    return {"x": state["x"] + jnp.tanh(x @ layer["w"] + layer["b"][None] * (1 + piece)) * micro["scale"]}


def last(shared, state, micro):
    return jnp.sum(jnp.square(state["x"] @ shared["in"].T - micro["target"]))


PARTS = Parts(first, middle, last)


def sums(number, weight, f):
    """The objective's part, and what is told of each of three losses."""
    return lambda *args: f(*args) * jnp.eye(4, dtype=jnp.float32)[number + 1].at[0].set(weight)


def between(shared, state, micro):
    return jnp.sum(jnp.sin(state["x"] @ shared["in"].T) * micro["target"])


def leaving(layer, state, piece, micro):
    """`middle`, which shows its state before and behind."""
    after = middle(layer, state, piece, micro)
    return after, [state, after]


def there(stage):
    """Behind every second stage the one exit; before the others one or none of two."""
    return [stage % 3 * (stage % 2 == 0), stage % 2]


EXITS = ((sums(0, 0.5, last), sums(1, 0.25, between)), (sums(1, 0.75, between),))
EXITING = Parts(first, leaving, sums(2, 1.0, last), EXITS, lambda piece: jnp.stack(there(piece)))


def inputs(stages: int, microbatches: int):
    draw = np.random.default_rng(0)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
    shared = {"in": normal(5, WIDTH)}
    layers = {"w": normal(stages, WIDTH, WIDTH), "b": normal(stages, WIDTH)}
    micros = {
        "ids": draw.integers(0, 5, (microbatches, ROWS)).astype(np.int32),
        "target": normal(microbatches, ROWS, 5),
        "scale": draw.uniform(0.5, 1.5, (microbatches, 1, 1)).astype(np.float32),
    }
    return shared, layers, micros


def plain(parts, order, shared, layers, micros):
    """The model without a pipeline: each microbatch through the stages of its path. Its sums."""
    total = 0.0
    for m, path in enumerate(order.paths):
        micro = jax.tree.map(lambda x, m=m: x[m], micros)
        state = first(shared, micro)
        for stage in path:
            state = parts.middle(jax.tree.map(lambda x, s=stage: x[s], layers), state, stage, micro)
            state, shown = state if parts.exits else (state, ())
            for functions, x, k in zip(parts.exits, shown, there(stage) if parts.exits else (), strict=True):
                total = total + (functions[k - 1](shared, x, micro) if k else 0)
        total = total + parts.last(shared, state, micro)
    return total.ravel()[0], total


def piped(table, executor, parts=PARTS):
    """(shared, layers, micros) -> loss, d_shared, d_layers on as many devices as the table has."""
    stages = jnp.asarray(table.order.placement.grid, jnp.int32)
    mesh = Mesh(np.array(jax.devices()[: table.devices]), ("stage",))

    def local(shared, layers, micros):
        own = stages[jax.lax.axis_index("stage")]
        loss, d_shared, d_layers = gradients(
            table, parts, shared, jax.tree.map(lambda x: x[0], layers), own, micros, executor=executor
        )
        return *jax.lax.psum((loss, d_shared), "stage"), jax.tree.map(lambda g: g[None], d_layers)

    specs = (P(), P("stage"), P())
    whole = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(), P(), P("stage")))
    flat = np.array(table.order.placement.grid).ravel()

    def f(shared, layers, micros):
        dealt = jax.tree.map(lambda x: x[flat].reshape(*stages.shape, *x.shape[1:]), layers)
        loss, d_shared, d_layers = whole(shared, dealt, micros)
        return loss, d_shared, jax.tree.map(lambda g: g.reshape(-1, *g.shape[2:])[np.argsort(flat)], d_layers)

    return jax.jit(f)


def assert_plain(table, executor="auto", parts=PARTS):
    args = inputs(table.order.placement.stages, table.order.microbatches)
    found = piped(table, executor, parts)(*args)
    run = jax.value_and_grad(partial(plain, parts, table.order), argnums=(0, 1), has_aux=True)
    (_, loss), (d_shared, d_layers) = jax.jit(run)(*args)
    np.testing.assert_allclose(found[0], loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found[1:]), jax.tree.leaves((d_shared, d_layers)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.abs(b).max()))


SCHEDULES = [
    ("gpipe", 4, 5, None),
    ("1f1b", 4, 6, None),
    ("1f1b", 1, 3, None),
    ("interleaved", 2, 4, 3),
    ("zb-h1", 3, 5, None),
    ("zb-v", 3, 6, None),
    ("dualpipe-v", 2, 6, None),
    ("checkfree+", 4, 6, None),
    ("skippipe", 4, 6, None),
]


@pytest.mark.parametrize(("ticks", "keep"), [("one-kind", "inputs"), ("mixed", "residuals")])
@pytest.mark.parametrize(("name", "stages", "m", "chunks"), SCHEDULES)
def test_every_schedule_gives_the_gradients_of_the_plain_model(name, stages, m, chunks, ticks, keep, devices):
    table = compile_table(make(name, stages, m, chunks), ticks, keep)
    assert ticks == "mixed" or executor_for(table) == "static"
    assert_plain(table)


@pytest.mark.parametrize(
    ("name", "stages", "m", "chunks", "ticks", "keep"),
    [
        ("1f1b", 3, 4, None, "mixed", "residuals"),
        ("1f1b", 1, 4, None, "one-kind", "residuals"),
        ("interleaved", 2, 4, 3, "one-kind", "residuals"),
        ("zb-h1", 3, 4, None, "mixed", "inputs"),
        ("zb-v", 3, 4, None, "one-kind", "residuals"),
    ],
)
def test_losses_inside_of_stages_are_those_of_the_plain_model(name, stages, m, chunks, ticks, keep, devices):
    """Each loss, the objective, and its gradients; of shared parameters too, which several stages use."""
    assert_plain(compile_table(make(name, stages, m, chunks), ticks, keep), parts=EXITING)


@pytest.mark.parametrize(("name", "stages", "m"), [("1f1b", 1, 4), ("zb-h1", 1, 4), ("1f1b", 2, 4)])
def test_loops_that_keep_residuals_are_the_same(name, stages, m, devices):
    """With one stage everything is passed on within a turn, with two nothing is."""
    assert_plain(compile_table(make(name, stages, m), "one-kind", "residuals"))


@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_one_stage_is_a_loop_without_branches_and_buffers(name, devices):
    def program(stages):
        table = compile_table(make(name, stages, 4), "one-kind", "residuals")
        return jax.make_jaxpr(piped(table, "static"))(*inputs(stages, 4)).jaxpr

    def equations(jaxpr, primitive):
        inner = [e for eqn in jaxpr.eqns for sub in inner_jaxprs(eqn) for e in equations(sub, primitive)]
        return [e for e in jaxpr.eqns if e.primitive.name == primitive] + inner

    one, two = program(1), program(2)
    assert not equations(one, "cond")
    assert equations(two, "cond"), "only some devices have the loss there"
    [loop] = equations(one, "scan")
    assert len(loop.outvars) == 4, "the loss, and the gradients of three parameters"


@pytest.mark.parametrize(("name", "ticks"), [("1f1b", "one-kind"), ("zb-h1", "mixed")])
def test_unrolled_ticks_are_the_same(name, ticks, devices):
    assert_plain(compile_table(make(name, 3, 4), ticks), "unroll")


@pytest.mark.parametrize("parts", [PARTS, EXITING], ids=["plain", "exits"])
def test_differentiating_through_the_permutes_is_the_same(parts, devices):
    table = compile_table(make("gpipe", 4, 6))
    args = inputs(4, 6)
    mesh = Mesh(np.array(devices[:4]), ("stage",))

    def local(shared, layers, micros):
        piece = jax.lax.axis_index("stage")[None]
        loss, d_shared, d_layers = autodiff.gradients(parts, shared, layers, piece, micros)
        return *jax.lax.psum((loss, d_shared), "stage"), d_layers

    whole = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("stage"), P()), out_specs=(P(), P(), P("stage")))
    found, expected = jax.jit(whole)(*args), piped(table, "auto", parts)(*args)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.abs(b).max()))


@cache
def temporary_bytes(name: str, m: int) -> int:
    """Of a program with four stages of some width, residuals kept."""
    wide = 64
    layers = {"w": jnp.zeros((4, wide, wide)), "b": jnp.zeros((4, wide))}
    micros = {"ids": jnp.zeros((m, 32), jnp.int32), "target": jnp.zeros((m, 32, 5)), "scale": jnp.ones((m, 1, 1))}
    args = {"in": jnp.zeros((5, wide))}, layers, micros
    if name != "autodiff":
        table = compile_table(make(name, 4, m, warm_up="double"), "one-kind", "residuals")
        return piped(table, "static").lower(*args).compile().memory_analysis().temp_size_in_bytes

    def local(shared, layers, micros):
        found = autodiff.gradients(PARTS, shared, layers, jax.lax.axis_index("stage")[None], micros)
        return *jax.lax.psum(found[:2], "stage"), found[2]

    mesh = Mesh(np.array(jax.devices()[:4]), ("stage",))
    whole = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("stage"), P()), out_specs=(P(), P(), P("stage")))
    return jax.jit(whole).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_1f1b_does_not_grow_with_the_number_of_microbatches(devices):
    state = 32 * 64 * 4
    flat = [temporary_bytes("1f1b", m) for m in (8, 32)]
    assert abs(flat[1] - flat[0]) < state, "not even one activation more"
    for other in ("gpipe", "autodiff"):
        growing = [temporary_bytes(other, m) for m in (8, 32)]
        assert growing[1] - growing[0] > 20 * state
        assert growing[1] > flat[1]


def test_a_tick_sends_once_and_nothing_is_gathered(devices):
    table = compile_table(make("1f1b", 4, 8, warm_up="double"), "one-kind", "inputs")
    text = piped(table, "static").lower(*inputs(4, 8)).as_text()
    # Three loops, F x n, (F B) x n, B x n: one permute for each action in them.
    assert text.count("stablehlo.collective_permute") == 4
    assert "all_gather" not in text


# -- permutes in branches ------------------------------------------------------------------------------------------------


def test_a_permute_in_a_branch_that_devices_take_differently_is_found(devices):
    mesh = Mesh(np.array(devices[:4]).reshape(2, 2), ("stage", "ring"))
    turn = lambda x: jax.lax.ppermute(x, "ring", [(0, 1), (1, 0)])

    def bad(x):
        return jax.lax.cond(jax.lax.axis_index("stage") == 0, turn, lambda x: x, x)

    def good(x):
        return jax.lax.cond(jnp.asarray(True), turn, lambda x: x, x)

    trace = lambda f: jax.make_jaxpr(
        jax.shard_map(f, mesh=mesh, in_specs=P("stage", "ring"), out_specs=P("stage", "ring"))
    )
    x = jnp.zeros((2, 2))
    assert divergent_permutes(trace(bad)(x)) == [
        "a permute over ring stands in a branch whose condition differs over stage"
    ]
    assert permutes(trace(bad)(x)) == {"ring"}
    assert divergent_permutes(trace(good)(x)) == []


@pytest.mark.parametrize("ticks", ["one-kind", "mixed"])
def test_no_executor_permutes_in_a_branch(ticks, devices):
    table = compile_table(make("zb-h1", 3, 4), ticks)
    assert divergent_permutes(jax.make_jaxpr(piped(table, "auto"))(*inputs(3, 4))) == []


def test_stages_that_permute_are_refused_in_mixed_ticks(devices):
    table = compile_table(make("zb-h1", 2, 4), "mixed")
    mesh = Mesh(np.array(devices[:4]).reshape(2, 2), ("stage", "ring"))
    turning = Parts(
        first, lambda *a: jax.tree.map(lambda x: jax.lax.ppermute(x, "ring", [(0, 1), (1, 0)]), middle(*a)), last
    )

    def local(shared, layers, micros):
        own = jax.lax.axis_index("stage")[None]
        found = gradients(table, turning, shared, layers, own, micros, axes=("ring",))
        return jax.lax.psum(found[0], ("stage", "ring"))

    whole = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("stage"), P()), out_specs=P())
    with pytest.raises(
        ValueError, match="mixed ticks, where devices take different branches, and its stages permute over"
    ):
        jax.jit(whole).lower(*inputs(2, 4))


# -- what cannot run -----------------------------------------------------------------------------------------------------


def test_tables_that_do_not_fit_are_refused_with_the_numbers(devices):
    table = compile_table(make("1f1b", 4, 8))
    shared, layers, micros = inputs(4, 6)
    with pytest.raises(ValueError, match="for 4 devices and 8 microbatches; mesh axis stage has 4, and there are 6"):
        piped(table, "auto").lower(shared, layers, micros)
    with pytest.raises(
        ValueError, match="the static executor needs ticks of one kind, and 1f1b was compiled with mixed"
    ):
        executor_for(table, "static")
    with pytest.raises(ValueError, match="executor = 'dynamic'; choose one of auto, static, switch, unroll"):
        executor_for(table, "dynamic")
