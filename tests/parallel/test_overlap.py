"""What runs beside a collective, read from schedules written by hand in XLA:TPU's forms, and from a real one."""

import jax
import jax.numpy as jnp
import pytest

from jaxpar.parallel.collectives import count
from jaxpar.parallel.hlo import parse
from jaxpar.parallel.mesh import MeshConfig
from jaxpar.parallel.overlap import overlaps

pytestmark = pytest.mark.quick

SIZES = MeshConfig(data=2, fsdp=2, tensor=2).sizes
RING = "source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}"
CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'


def seen(hlo: str) -> list[tuple]:
    return [(o.collective.op, o.collective.times, o.how, o.products, o.cycles) for o in overlaps(hlo, SIZES)]


PAIRS = f"""HloModule m, is_scheduled=true

%product (a: f32[8,8], b: f32[8,8]) -> f32[8,8] {{
  %a = f32[8,8]{{1,0}} parameter(0)
  %b = f32[8,8]{{1,0}} parameter(1)
  %c = f32[8,8]{{1,0}} convolution(%a, %b), dim_labels=bf_io->bf
  ROOT %t = f32[8,8]{{1,0}} tanh(%c)
}}

%sum (a: f32[8,8]) -> f32[8,8] {{
  %a.1 = f32[8,8]{{1,0}} parameter(0)
  ROOT %s = f32[8,8]{{1,0}} add(%a.1, %a.1)
}}

%body (t: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {{
  %t.1 = (s32[], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%t.1), index=0
  %x = f32[8,8] get-tuple-element(%t.1), index=1
  %one = s32[] constant(1)
  %i.1 = s32[] add(%i, %one)
  %ps = (f32[8,8], f32[8,8], u32[], u32[]) collective-permute-start(%x), {RING}
  %p.1 = f32[8,8] fusion(%x, %x), kind=kOutput, calls=%product, {CYCLES % 100}
  %e.1 = f32[8,8] fusion(%p.1), kind=kLoop, calls=%sum, {CYCLES % 7}
  %pd = f32[8,8] collective-permute-done(%ps)
  %p.2 = f32[8,8] fusion(%pd, %e.1), kind=kOutput, calls=%product, {CYCLES % 100}
  ROOT %r = (s32[], f32[8,8]) tuple(%i.1, %p.2)
}}

%condition (t: (s32[], f32[8,8])) -> pred[] {{
  %limit = s32[] constant(5)
  %t.2 = (s32[], f32[8,8]) parameter(0)
  %i.2 = s32[] get-tuple-element(%t.2), index=0
  ROOT %l = pred[] compare(%i.2, %limit), direction=LT
}}

%wrapped (x: f32[8,8]) -> f32[16,8] {{
  %x.3 = f32[8,8] parameter(0)
  ROOT %g = f32[16,8] all-gather(%x.3), replica_groups=[4,2]<=[8], dimensions={{0}}
}}

ENTRY %main (p: f32[8,8]) -> f32[16,8] {{
  %p = f32[8,8] parameter(0)
  %zero = s32[] constant(2)
  %zero.1 = s32[] copy(%zero)
  %init = (s32[], f32[8,8]) tuple(%zero.1, %p)
  %ws = ((f32[8,8]), f32[16,8], s32[]) async-start(%p), calls=%wrapped
  %w = (s32[], f32[8,8]) while(%init), condition=%condition, body=%body
  %wd = f32[16,8] async-done(%ws), calls=%wrapped
  %q = f32[8,8] get-tuple-element(%w), index=1
  %qs = (f32[8,8], f32[8,8], u32[], u32[]) collective-permute-start(%q), {RING}
  %qd = f32[8,8] collective-permute-done(%qs)
  %ar = f32[8,8] all-reduce(%qd), replica_groups=[4,2]<=[8], to_apply=%sum
  ROOT %o = f32[16,8] add(%wd, %wd)
}}
"""


def test_pairs_and_loops():
    """The loop runs from 2 to 5; the permute in it has one product beside it, and the gather around it has all six."""
    assert seen(PAIRS) == [
        ("all-gather", 1, "pair", 6, 3 * 207),
        ("collective-permute", 1, "pair", 0, 0),
        ("all-reduce", 1, "alone", 0, 0),
        ("collective-permute", 3, "pair", 1, 107),
    ]
    assert [o.hidden for o in overlaps(PAIRS, SIZES)] == [True, False, False, True]
    counted = count(PAIRS, SIZES)
    assert counted.unknown_loops == 0
    assert [(c.op, c.times) for c in counted.collectives] == [(s[0], s[1]) for s in seen(PAIRS)]


def test_a_kernel_is_a_product():
    """In place of the fusion beside the permute in the loop; another custom call is none."""
    fused = f"fusion(%x, %x), kind=kOutput, calls=%product, {CYCLES % 100}"
    for target, products in (("tpu_custom_call", 1), ("Sharding", 0)):
        text = PAIRS.replace(fused, f'custom-call(%x, %x), custom_call_target="{target}"')
        assert seen(text)[-1] == ("collective-permute", 3, "pair", products, 7)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("direction=LT", "direction=NE"),
        ("%one = s32[] constant(1)", "%one = s32[] constant(2)"),
        ("%zero = s32[] constant(2)", "%zero = s32[] parameter(1)"),
        ("%limit = s32[] constant(5)", "%limit = s32[] negate(%i.2)"),
        ("s32[] add(%i, %one)", "s32[] multiply(%i, %one)"),
    ],
)
def test_a_loop_that_is_no_counted_one_is_unknown(old, new):
    text = PAIRS.replace(old, new)
    assert text != PAIRS
    assert count(text, SIZES).unknown_loops == 1


def test_a_loop_that_never_runs():
    module = parse(PAIRS.replace("%limit = s32[] constant(5)", "%limit = s32[] constant(1)"))
    [loop] = [one for one in module.computations["main"] if one.opcode == "while"]
    assert module.trips(loop) == 0


CHAIN = f"""HloModule m, is_scheduled=true

%begin (a: f32[8,4]) -> (f32[8,4], f32[8,8]) {{
  %a.1 = f32[8,4] parameter(0)
  %g.1 = f32[8,8] all-gather(%a.1), replica_groups=[4,2]<=[8], dimensions={{1}}, frontend_attributes={{chain_id="3"}}
  ROOT %c = (f32[8,4], f32[8,8]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}}

%carry (a: f32[8,4], b: f32[8,8]) -> (f32[8,8], f32[8,8]) {{
  %a.2 = f32[8,4] parameter(0)
  %b.2 = f32[8,8] parameter(1)
  %g.2 = f32[8,8] all-gather(%a.2), replica_groups=[4,2]<=[8], dimensions={{1}}, frontend_attributes={{chain_id="3"}}
  %d = f32[8,8] convolution(%b.2, %b.2), dim_labels=bf_io->bf
  ROOT %u = (f32[8,8], f32[8,8]) tuple(%g.2, %d)
}}

%end (a: f32[8,4]) -> f32[8,8] {{
  %a.3 = f32[8,4] parameter(0)
  %g.3 = f32[8,8] all-gather(%a.3), replica_groups=[4,2]<=[8], dimensions={{1}}, frontend_attributes={{chain_id="3"}}
  ROOT %c.1 = f32[8,8] custom-call(%g.3), custom_call_target="AsyncCollectiveDone"
}}

%all-reduce-scatter.1 (a: f32[8,8]) -> f32[8,4] {{
  %a.4 = f32[8,8] parameter(0)
  %r = f32[8,8] all-reduce(%a.4), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %ds = f32[8,4] dynamic-slice(%r, %z, %z), dynamic_slice_sizes={{8,4}}
}}

ENTRY %main (p: f32[8,4], q: f32[8,8]) -> f32[8,4] {{
  %p = f32[8,4] parameter(0)
  %q = f32[8,8] parameter(1)
  %async-collective-start = (f32[8,4], f32[8,8]) fusion(%p), kind=kCustom, calls=%begin
  %fusion.1 = (f32[8,8], f32[8,8]) fusion(%p, %q), kind=kOutput, calls=%carry, {CYCLES % 50}
  %fusion.2 = (f32[8,8], f32[8,8]) fusion(%p, %q), kind=kOutput, calls=%carry, {CYCLES % 60}
  %async-collective-done = f32[8,8] fusion(%p), kind=kCustom, calls=%end
  ROOT %f = f32[8,4] fusion(%async-collective-done), kind=kCustom, calls=%all-reduce-scatter.1
}}
"""


def test_a_chain_of_fusions_is_one_collective():
    """XLA:TPU's form for a gather that products carry on; and its reduce-scatter, an all-reduce and a slice in one."""
    assert seen(CHAIN) == [("all-gather", 1, "fused", 2, 110), ("reduce-scatter", 1, "alone", 0, 0)]
    gather, scatter = count(CHAIN, SIZES).collectives
    assert (gather.axes, gather.nbytes, gather.sent) == (("tensor",), 256, 128)
    assert (scatter.axes, scatter.nbytes, scatter.sent) == (("tensor",), 256, 128)


def test_the_order_of_a_module_that_is_not_scheduled_says_nothing():
    with pytest.raises(ValueError, match="not scheduled"):
        overlaps(PAIRS.replace(", is_scheduled=true", ""), SIZES)


def test_of_a_conditional_the_branch_with_the_most_counts():
    text = PAIRS.replace(
        "%w = (s32[], f32[8,8]) while(%init), condition=%condition, body=%body",
        "%w = (s32[], f32[8,8]) conditional(%k, %init, %init), branch_computations={%body, %condition}",
    )
    assert seen(text)[0] == ("all-gather", 1, "pair", 2, 207)


def test_a_real_loop():
    """What XLA notes of a scan."""

    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    module = parse(jax.jit(f).lower(jnp.ones((4, 4)), jnp.ones((7, 4, 4))).compile().as_text())
    [loop] = [one for body in module.computations.values() for one in body if one.opcode == "while"]
    assert module.trips(loop) == 7
