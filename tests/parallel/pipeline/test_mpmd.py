"""A schedule run from the host, stage by stage: equal to the one program, and it holds what the simulator says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context
from jaxpar.parallel.pipeline.execute import Parts
from jaxpar.parallel.pipeline.mpmd import Programs, Specs
from jaxpar.parallel.pipeline.orders import gpipe, make, one_f_one_b
from jaxpar.parallel.pipeline.simulate import Costs, simulate
from jaxpar.parallel.pipeline.table import compile_table
from tests.parallel.pipeline.test_execute import PARTS, ROWS, SCHEDULES, WIDTH, inputs, piped, plain

P = PartitionSpec


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.abs(b).max()))


def staged(layers):
    """Stacked layers as a list of stages."""
    n = len(jax.tree.leaves(layers)[0])
    return [jax.tree.map(lambda x, s=s: x[s], layers) for s in range(n)]


def stacked(stages):
    return jax.tree.map(lambda *x: np.stack([np.asarray(a) for a in x]), *stages)


def line(devices, n: int) -> Mesh:
    return Mesh(np.array(devices[:n]), ("stage",))


CASES = [(*case, "residuals") for case in SCHEDULES if case[1] > 1]
REMADE = [(*case, "inputs") for case in SCHEDULES if case[0] in ("zb-h1", "dualpipe-v")]


@pytest.mark.parametrize(("name", "stages", "m", "chunks", "keep"), CASES + REMADE)
def test_every_schedule_gives_what_the_plain_model_and_the_one_program_give(name, stages, m, chunks, keep, devices):
    order = make(name, stages, m, chunks)
    shared, layers, micros = inputs(order.placement.stages, m)
    programs = Programs(order, PARTS, line(devices, stages), keep=keep)
    found = programs.gradients(shared, staged(layers), range(order.placement.stages), micros)
    mine = found.loss, found.d_shared, stacked(found.d_layers)
    model = jax.value_and_grad(partial(plain, PARTS, order), argnums=(0, 1), has_aux=True)
    (_, loss), grads = jax.jit(model)(shared, layers, micros)
    close(mine, (loss, *grads))
    if keep == "residuals":
        close(mine, piped(compile_table(order, "mixed", keep), "auto")(shared, layers, micros))
    expected = simulate(order)
    assert (found.activations, found.held) == (expected.activations, expected.held)


@pytest.mark.quick
def test_what_is_held_ends_with_its_last_reader_and_nothing_is_compiled_twice(devices):
    shared, layers, micros = inputs(4, 8)
    stages = staged(layers)
    run = lambda programs: programs.gradients(shared, stages, range(4), micros)
    programs = Programs(one_f_one_b(4, 8), PARTS, line(devices, 4), keep="inputs")
    found = run(programs)
    # A microbatch's input, and no more: [ROWS, WIDTH] float32.
    assert found.bytes == tuple(n * ROWS * WIDTH * 4 for n in found.activations) == tuple(n * 64 for n in (4, 3, 2, 1))
    assert run(Programs(gpipe(4, 8), PARTS, programs.mesh, keep="inputs")).bytes == (8 * 64,) * 4
    del found
    compiled, before = programs.whole.forward._cache_size(), len(jax.live_arrays())
    found = run(programs)
    assert programs.whole.forward._cache_size() == compiled
    assert len(jax.live_arrays()) - before == len(jax.tree.leaves((found.loss, found.d_shared, found.d_layers)))


def test_bytes_of_a_split_backward_pass_are_the_simulators(devices):
    def run(m):
        shared, layers, micros = inputs(3, m)
        programs = Programs(make("zb-h1", 3, m), PARTS, line(devices, 3), keep="inputs")
        return programs.gradients(shared, staged(layers), range(3), micros)

    activation = ROWS * WIDTH * 4
    [weight] = {n - activation for n in run(1).bytes}  # what BI reads, and what it leaves
    assert weight > 0
    assert run(5).bytes == simulate(make("zb-h1", 3, 5), Costs(activation=activation, weight=weight)).bytes


def test_a_sub_mesh_shares_rows_and_weights(devices):
    mesh = Mesh(np.array(devices[:8]).reshape(2, 2, 2), ("data", "stage", "tensor"))
    specs = Specs(
        layers={"w": P(None, "tensor"), "b": P("tensor")},
        state=P("data", None),
        micro={"ids": P("data"), "target": P("data"), "scale": P()},
    )
    order = make("zb-h1", 2, 3)
    args = shared, layers, micros = inputs(2, 3)
    found = Programs(order, PARTS, mesh, specs=specs).gradients(shared, staged(layers), range(2), micros)
    (_, loss), grads = jax.jit(jax.value_and_grad(partial(plain, PARTS, order), argnums=(0, 1), has_aux=True))(*args)
    close((found.loss, found.d_shared, stacked(found.d_layers)), (loss, *grads))
    for stage, tree in enumerate(found.d_layers):
        assert tree["w"].sharding.spec == P(None, "tensor")
        assert tree["w"].sharding.device_set == set(mesh.devices[:, stage].flat)


def test_stages_of_different_depths_need_no_padding(devices):
    cfg = ModelConfig(vocabulary=32, layers=3, width=32, heads=4, kv_heads=2, hidden=48, init_std=0.2, dropout=0.1)
    params = jax.jit(partial(decoder.init, cfg))(jax.random.key(0))
    rows, length, m = 2, 8, 2
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 32, (m, rows, length + 1)).astype(np.int32)
    micros = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "ids": np.arange(m * rows).reshape(m, rows)}

    def ctx(micro):
        places = jnp.broadcast_to(jnp.arange(length), (rows, length))
        return Context(places, jnp.ones((rows, length), jnp.int32), key=jax.random.key(7), sample_ids=micro["ids"])

    parts = Parts(
        first=lambda shared, micro: decoder.embed(cfg, shared, micro["tokens"], ctx(micro)),
        middle=lambda layers, x, piece, micro: decoder.blocks(cfg, layers, x, ctx(micro), piece)[0],
        last=lambda shared, x, micro: decoder.head(cfg, shared, x, ctx(micro), micro["targets"]).loss_sum,
    )
    layers = params.pop("layers")
    cut = lambda start, stop: jax.tree.map(lambda x: x[start:stop], layers)
    programs = Programs(one_f_one_b(2, m), parts, line(devices, 2))
    found = programs.gradients(params, [cut(0, 1), cut(1, 3)], [0, 1], micros)

    def whole(params, layers):
        def one(total, micro):
            args = {**params, "layers": layers}, micro["tokens"], micro["targets"], None, ctx(micro)
            return total + decoder.loss(cfg, *args).loss_sum, None

        return jax.lax.scan(one, 0.0, micros)[0]

    loss, (d_shared, d_layers) = jax.jit(jax.value_and_grad(whole, argnums=(0, 1)))(params, layers)
    mine = jax.tree.map(lambda *x: np.concatenate([np.asarray(a) for a in x]), *found.d_layers)
    close((found.loss, found.d_shared, mine), (loss, d_shared, d_layers))


@pytest.mark.quick
def test_what_does_not_fit_is_refused_with_the_numbers(devices):
    with pytest.raises(ValueError, match="1f1b is an order for 4 devices, and mesh axis stage has 2; give a mesh with"):
        Programs(one_f_one_b(4, 8), PARTS, line(devices, 2))
    shared, layers, micros = inputs(4, 6)
    programs = Programs(one_f_one_b(4, 8), PARTS, line(devices, 4))
    with pytest.raises(
        ValueError, match="for 4 stages and 8 microbatches; there are layers for 4 stages, pieces for 4, and 6"
    ):
        programs.gradients(shared, staged(layers), range(4), micros)
    with pytest.raises(ValueError, match="keep = 'all'; it is 'inputs' or 'residuals'"):
        Programs(one_f_one_b(4, 8), PARTS, line(devices, 4), keep="all")
