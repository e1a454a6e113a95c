"""Reading compiled programs: forms of groups, asynchronous pairs, loops, and bytes. The texts are XLA's own forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxpar.parallel.collectives import Collective, count
from jaxpar.parallel.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.quick

CUBE = MeshConfig(data=2, fsdp=2, tensor=2).sizes
RING = MeshConfig(stage=2, fsdp=2, sequence=2).sizes


def one(instruction: str, sizes=CUBE) -> Collective:
    counted = count(f"HloModule m\n\nENTRY %main (p: f32[4]) -> f32[4] {{\n  {instruction}\n}}\n", sizes)
    (found,) = counted.collectives
    return found


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",), 2),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("{{4,0},{5,1},{6,2},{7,3}}", ("data",), 2),
        ("[4,2]<=[8]", ("tensor",), 2),
        ("[4,2]<=[4,2]T(1,0)", ("fsdp",), 2),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",), 2),
        ("[4,2]<=[2,2,2]T(2,1,0)", ("data",), 2),
        ("[2,4]<=[4,2]T(1,0)", ("data", "fsdp"), 4),
        ("[1,8]<=[8]", ("data", "fsdp", "tensor"), 8),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0'}", ("data", "fsdp"), 4),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_2'}", ("tensor",), 2),
        ("mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_0'}", ("fsdp",), 2),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_1'}", ("data", "tensor"), 4),
        ("{}", ("data", "fsdp", "tensor"), 8),
        ("{{0,1},{2,3},{4,6},{5,7}}", None, 2),
    ],
)
def test_groups_are_named_by_the_axes_they_run_over(groups, axes, size):
    if groups == "[4,2]<=[4,2]T(1,0)":
        # positions 0..7 as 4 x 2, transposed: [[0,2,4,6],[1,3,5,7]] cut into pairs: neighbours along fsdp
        assert np.arange(8).reshape(4, 2).T.reshape(4, 2).tolist() == [[0, 2], [4, 6], [1, 3], [5, 7]]
    found = one(f"%a = f32[4]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add")
    assert (found.axes, found.group) == (axes, size)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("sequence",)),
        ("[4,2]<=[2,2,2]T(2,1,0)", ("stage",)),
        ("[2,4]<=[8]", ("fsdp", "sequence")),
        ("[1,8]<=[8]", ("stage", "fsdp", "sequence")),
    ],
)
def test_groups_over_stages_and_the_sequence(groups, axes):
    assert one(f"%a = f32[4]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add", RING).axes == axes


@pytest.mark.parametrize(
    ("instruction", "op", "nbytes"),
    [
        (
            "%a = bf16[8,16]{1,0:T(8,128)(2,1)} all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%s",
            "all-reduce",
            256,
        ),
        ("%a = (f32[2]{0}, s8[3]{0}, pred[5]{0}) all-reduce(%p, %q, %r), replica_groups={}", "all-reduce", 16),
        ("ROOT %a = f32[8,4]{1,0} all-gather(%p), replica_groups=[4,2]<=[8], dimensions={0}", "all-gather", 128),
        ("%a = f32[4,4]{1,0} reduce-scatter(%p), replica_groups=[4,2]<=[8], dimensions={0}", "reduce-scatter", 128),
        ("%a = (f32[4]{0}, f32[8]{0}) all-gather-start(%p), replica_groups=[4,2]<=[8]", "all-gather", 32),
        (
            "%a = ((f32[4], f32[2]), (f32[8], f32[4])) all-gather-start(%p, %q), replica_groups=[4,2]<=[8]",
            "all-gather",
            48,
        ),
        ("%a = f32[8]{0} all-reduce-start(%p), replica_groups=[4,2]<=[8], to_apply=%add", "all-reduce", 32),
        (
            "%a = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            16,
        ),
        ("%a = f8e4m3fn[6]{0} all-to-all(%p), replica_groups=[4,2]<=[8]", "all-to-all", 6),
        ("%a = s4[6]{0} collective-broadcast(%p), replica_groups=[4,2]<=[8]", "collective-broadcast", 3),
        ("%a = c64[3]{0} all-to-all(%p), replica_groups=[4,2]<=[8]", "all-to-all", 24),
    ],
)
def test_payload(instruction, op, nbytes):
    found = one(instruction)
    assert (found.op, found.nbytes) == (op, nbytes)


def test_permutes_are_named_by_the_axes_along_which_anything_moves():
    ring = "{{0,2},{2,0},{1,3},{3,1},{4,6},{6,4},{5,7},{7,5}}"
    found = one(f"%a = f32[4]{{0}} collective-permute(%p), source_target_pairs={ring}")
    assert (found.axes, found.group) == (("fsdp",), 2)
    found = one("%a = f32[4]{0} collective-permute(%p), source_target_pairs={{0,3},{1,1}}")
    assert found.axes == ("fsdp", "tensor")
    # To the next stage alone, and round a ring of two.
    found = one("%a = f32[4]{0} collective-permute(%p), source_target_pairs={{0,4},{1,5},{2,6},{3,7}}", RING)
    assert (found.axes, found.group) == (("stage",), 2)
    found = one("%a = f32[4]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0},{6,7},{7,6}}", RING)
    assert (found.axes, found.group) == (("sequence",), 2)


@pytest.mark.parametrize(
    ("op", "sent"),
    [("all-reduce", 150), ("all-gather", 75), ("reduce-scatter", 75), ("all-to-all", 75), ("collective-permute", 100)],
)
def test_ring_algorithms_send(op, sent):
    assert Collective(op, ("fsdp",), 4, 100, 1).sent == sent


LOOPS = """HloModule m

%inner_body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = f32[4]{0} all-reduce(%x), replica_groups=[4,2]<=[8], to_apply=%add
}

%cond (t: (s32[], f32[4])) -> pred[] {
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

%outer_body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %g = f32[8]{0} all-gather(%x), replica_groups=[4,2]<=[8], dimensions={0}
  %w = (s32[], f32[4]{0}) while(%t), condition=%cond, body=%inner_body, backend_config={"known_trip_count":{"n":"5"}}
}

%wrapped (x: f32[8]) -> f32[4] {
  ROOT %s = f32[4]{0} reduce-scatter(%x), replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add
}

%then (x: f32[4]) -> f32[4] {
  ROOT %a = f32[4]{0} all-to-all(%x), replica_groups=[4,2]<=[8]
}

%else (x: f32[4]) -> f32[4] {
  ROOT %a = f32[4]{0} copy(%x)
}

%unused (x: f32[4]) -> f32[4] {
  ROOT %a = f32[4]{0} all-reduce(%x), replica_groups=[4,2]<=[8], to_apply=%add
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w.1 = (s32[], f32[4]{0}) while(%t), condition=%cond, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
  %w.2 = (s32[], f32[4]{0}) while(%t), condition=%cond, body=%inner_body
  %st = ((f32[8]{0}), f32[4]{0}, s32[]) async-start(%x), calls=%wrapped
  %dn = f32[4]{0} async-done(%st), calls=%wrapped
  %b = f32[4]{0} conditional(%q, %x, %x), branch_computations={%then, %else}
  %gs = (f32[4]{0}, f32[8]{0}) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}
  %gd = f32[8]{0} all-gather-done(%gs)
  ROOT %f = f32[4]{0} fusion(%w), kind=kLoop, calls=%else, metadata={op_name="all-reduce(fake)"}
}
"""


def test_loops_multiply_and_pairs_count_once():
    counted = count(LOOPS, CUBE)
    found = sorted((c.op, c.times) for c in counted.collectives)
    assert found == [
        ("all-gather", 1),
        ("all-gather", 3),
        ("all-reduce", 1),
        ("all-reduce", 15),
        ("all-to-all", 1),
        ("reduce-scatter", 1),
    ]
    assert counted.unknown_loops == 1
    assert counted.branches == 2


def test_a_real_program_with_a_loop(devices):
    """Four matmuls with a contracted dimension on tensor: one all-reduce in a loop of four, nothing else."""
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))

    def f(x, w):
        def body(x, w):
            x = jax.lax.with_sharding_constraint(x, place("data", "tensor"))
            return jax.lax.with_sharding_constraint(x @ w, place("data", None)), None

        return jax.lax.scan(body, x, w)[0]

    x = jax.device_put(jnp.ones((8, 6)), place("data"))
    w = jax.device_put(jnp.ones((4, 6, 6)), place(None, "tensor"))
    counted = count(jax.jit(f).lower(x, w).compile().as_text(), dict(mesh.shape))
    assert [(c.op, c.axes, c.nbytes, c.times) for c in counted.collectives] == [("all-reduce", ("tensor",), 48, 4)]
    assert "dot_general" in counted.collectives[0].where
