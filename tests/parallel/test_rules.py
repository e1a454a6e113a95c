"""Axis rules: what passes the check can be sharded, what fails says why with its numbers."""

import re
import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_tree import tree
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jaxpar.models.spec import Normal, ParamSpec
from jaxpar.parallel.mesh import AXES, MeshConfig, make_mesh
from jaxpar.parallel.rules import ACTIVATIONS, PARAMS, Rules, batch_sharding, check, constrain, named, shardings

pytestmark = pytest.mark.quick

ONE = MeshConfig().sizes
CUBE = MeshConfig(data=2, fsdp=2, tensor=2).sizes
P = PartitionSpec


@dataclass(frozen=True)
class Leaf:
    """The whole interface: no model is needed."""

    shape: tuple
    axes: tuple
    dtype: Any = "float32"


def test_the_default_rules():
    rules = Rules()
    assert rules.spec_for(("layers", "embed", "heads", "head_size")) == P("stage", "fsdp", "tensor", None)
    assert rules.spec_for(("layers", "norm")) == P("stage", None)
    assert rules.spec_for(("vocabulary", "embed")) == P("tensor", "fsdp")
    assert rules.spec_for((None, "embed")) == P(None, "fsdp")
    assert rules.spec_for(("batch", "length", "embed"), "activations") == P(("data", "fsdp"), "sequence", None)
    assert rules.spec_for(("batch", "length", "heads", "head_size"), "activations") == P(
        ("data", "fsdp"), "sequence", "tensor", None
    )
    assert rules.spec_for(()) == P()


def test_rules_that_say_the_same_are_equal_and_hash_alike():
    reordered = Rules(dict(reversed(PARAMS.items())), {**ACTIVATIONS, "embed": None, "mlp": "tensor"})
    assert reordered == Rules()
    assert hash(reordered) == hash(Rules())
    assert Rules().with_params(embed=()) != Rules()
    assert Rules().with_params(embed=None).spec_for(("embed",)) == P(None)
    assert Rules().with_activations(length="tensor").spec_for(("length",), "activations") == P("tensor")


def test_replicate_changes_both_tables():
    rules = Rules().replicate("kv_heads", "vocabulary")
    for kind in ("params", "activations"):
        assert rules.spec_for(("kv_heads",), kind) == P(None)
    assert rules.spec_for(("vocabulary", "embed")) == P(None, "fsdp")
    with pytest.raises(ValueError, match=r"no rule for 'kvheads' to replicate \(did you mean 'kv_heads'\?\)"):
        Rules().replicate("kvheads")


WRONG = {
    "unknown logical axis": (
        {"block": {"gate": Leaf((4, 8), ("embed", "mpl"))}},
        ONE,
        {},
        "block/gate [4, 8] has the logical axis 'mpl', for which there is no rule under params (did you mean 'mlp'?); "
        "add one with Rules().with_params(mpl=())",
    ),
    "unknown mesh axis": (
        {},
        ONE,
        {"rules": Rules().with_params(embed="tensr")},
        "the params rule embed -> tensr names mesh axis 'tensr', which the mesh does not have (did you mean 'tensor'?)",
    ),
    "collision": (
        {"a": {"kernel": Leaf((32, 4, 8), ("embed", "heads", "head_size"))}},
        ONE,  # also where both axes have size 1
        {"rules": Rules().with_params(embed="tensor")},
        "Colliding params rules for a/kernel [32, 4, 8]: dimension 0 (embed -> tensor) and dimension 1 (heads -> "
        "tensor) both lie on mesh axis tensor, which makes the spec (tensor, tensor, None) impossible; map embed or "
        "heads to other mesh axes or ()",
    ),
    "heads": (
        tree(heads=6, kv_heads=4),
        {**ONE, "fsdp": 2, "tensor": 4},
        {},
        "layers/attention/out/kernel [2, 6, 5, 32] (and 2 more with the same heads): dimension 1 (heads = 6) does not "
        "divide over tensor(4): 6 / 4 is no whole number; use 4 or 8, or 3 instead of 4 devices along tensor, or "
        "replicate it with Rules().replicate('heads')",
    ),
    "smaller than the mesh axis": (
        tree(kv_heads=2),
        {**ONE, "tensor": 4},
        {},
        "(kv_heads = 2) does not divide over tensor(4): 2 / 4 is no whole number; use 4, or 2 instead of 4 devices",
    ),
    "width": (
        {"w": Leaf((36, 8), ("embed", "mlp"))},
        {**ONE, "fsdp": 8},
        {},
        "w [36, 8]: dimension 0 (embed = 36) does not divide over fsdp(8): 36 / 8 is no whole number; use 32 or 40, "
        "or 6 instead of 8 devices along fsdp",
    ),
    "batch": (
        {},
        {**ONE, "data": 2, "fsdp": 4},
        {"rows": 12},
        "a batch of 12 rows does not divide over data(2) × fsdp(4) = 8: 12 / 8 is no whole number; use 8 or 16, or 6 "
        "instead of 8 devices along data and fsdp",
    ),
    "batch on one axis": (
        {},
        {**ONE, "stage": 2, "fsdp": 4},  # every stage sees all rows
        {"rows": 6},
        "a batch of 6 rows does not divide over fsdp(4): 6 / 4 is no whole number; use 4 or 8, or 3 instead of 4 "
        "devices along fsdp",
    ),
    "layers": (
        {"norm": Leaf((6, 32), ("layers", "norm"))},
        {**ONE, "stage": 4},
        {},
        "norm [6, 32]: dimension 0 (layers = 6) does not divide over stage(4): 6 / 4 is no whole number; use 4 or 8, "
        "or 3 instead of 4 devices along stage",
    ),
    "length": (
        {},
        {**ONE, "sequence": 4},
        {"activations": {"length": 130}},
        "an activation (length = 130) does not divide over sequence(4): 130 / 4 is no whole number; use 128 or 132, or "
        "2 instead of 4 devices along sequence",
    ),
    "activation": (
        {},
        CUBE,
        {"activations": {"heads": 4, "kv_heads": 3}},
        "an activation (kv_heads = 3) does not divide over tensor(2): 3 / 2 is no whole number; use 2 or 4",
    ),
    "activation without a rule": (
        {},
        ONE,
        {"activations": {"lenght": 3}},
        "an activation has the logical axis 'lenght', for which there is no rule under activations (did you mean "
        "'length'?)",
    ),
    "large and replicated": (
        {"table": Leaf((50257, 1024), ("vocabulary", "embed")), "norm": Leaf((2**25,), ("norm",))},
        {**ONE, "data": 2, "fsdp": 4},
        {"rules": Rules().replicate("vocabulary", "embed")},
        "table [50257, 1024] lies whole on every device: 196.3 MiB each, the limit is 64.0 MiB, and fsdp(4) could "
        "share it; use Rules().with_params(embed='fsdp'), or a higher limit (large=)",
    ),
}


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.replace(" ", "_"))
def test_a_wrong_layout_gets_one_sentence_with_its_numbers(case):
    specs, sizes, options, sentence = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        check(specs, sizes, **{"rules": Rules(), **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("size", "n"), [(6, 4), (36, 8), (50257, 2), (7, 8), (1, 3)], ids=lambda v: str(v))
def test_every_fix_that_a_sentence_offers_works(size, n):
    def one(size, n, rules):
        return check({"w": Leaf((size, 3), ("mlp", None))}, {**ONE, "tensor": n}, rules)

    with pytest.raises(ValueError, match="does not divide") as error:
        one(size, n, Rules())
    text = str(error.value)
    values, fewer = re.search(r"use ([\d or]+), or (\d+) instead of", text).groups()
    for value in values.split(" or "):
        one(int(value), n, Rules())
    one(size, int(fewer), Rules())
    one(size, n, eval(re.search(r"replicate it with (.*)$", text)[1]))


def test_a_rule_that_names_an_axis_twice():
    with pytest.raises(ValueError, match=r"the activations rule batch -> data\+data names a mesh axis twice"):
        Rules().with_activations(batch=("data", "data"))


def test_large_tensors_that_may_lie_whole():
    table = {"table": Leaf((50257, 1024), ("vocabulary", "embed"))}
    whole = Rules().replicate("vocabulary", "embed")
    check(table, {**ONE, "data": 8}, whole)  # whole copies are what `data` means
    check(table, {**ONE, "stage": 4, "sequence": 2}, whole)  # no axis that could share a table
    check({"norm": Leaf((126, 2**20), ("layers", "norm"))}, CUBE, whole)  # 504 MiB, but a vector for each layer
    check(table, CUBE, whole, large=2**28)
    check(table, CUBE, whole, on_large="ignore")
    check(table, CUBE, Rules().replicate("vocabulary"))  # fsdp shares it
    with pytest.warns(UserWarning, match=r"table \[50257, 1024\] lies whole on every device: 196.3 MiB"):
        check(table, CUBE, whole, on_large="warn")


def test_a_table_that_nothing_could_share_is_no_error():
    """50257 rows do not divide over tensor, and giving its width to tensor would collide in every kernel."""
    specs = {"table": Leaf((50257, 1024), ("vocabulary", "embed")), "up": Leaf((1024, 4096), ("embed", "mlp"))}
    check(specs, {**ONE, "data": 4, "tensor": 2}, Rules().replicate("vocabulary"))


AXIS = st.sampled_from([None, *PARAMS])


@given(
    sizes=st.tuples(*[st.integers(1, 5)] * len(AXES)),
    dimensions=st.lists(st.tuples(AXIS, st.integers(1, 24)), max_size=4),
    changed=st.dictionaries(st.sampled_from(list(PARAMS)), st.sampled_from([(), *[(a,) for a in AXES], AXES[1:]])),
)
def test_check_passes_exactly_where_jax_can_shard(sizes, dimensions, changed):
    axes = tuple(a for a, _ in dimensions)
    shape = tuple(n for _, n in dimensions)
    rules = Rules().with_params(**changed)
    mesh = AbstractMesh(sizes, AXES)
    rows = [rules.mesh_axes(a) for a in axes]
    try:
        spec = P(*(row or None for row in rows))
        expected = NamedSharding(mesh, spec).shard_shape(shape)
    except Exception:
        with pytest.raises(ValueError, match=r"Colliding params rules for t |does not divide over"):
            check({"t": Leaf(shape, axes)}, dict(zip(AXES, sizes, strict=True)), rules)
    else:
        check({"t": Leaf(shape, axes)}, dict(zip(AXES, sizes, strict=True)), rules)
        assert shardings({"t": Leaf(shape, axes)}, mesh, rules)["t"].shard_shape(shape) == expected


@given(rows=st.integers(1, 64), sizes=st.tuples(*[st.integers(1, 5)] * len(AXES)))
def test_check_passes_exactly_where_a_batch_can_be_sharded(rows, sizes):
    mesh = AbstractMesh(sizes, AXES)
    try:
        batch_sharding(mesh, Rules()).shard_shape((rows, 7))
    except ValueError:
        with pytest.raises(ValueError, match=f"a batch of {rows} rows does not divide over"):
            check({}, mesh, Rules(), rows=rows)
    else:
        check({}, mesh, Rules(), rows=rows)


def test_shardings_of_state_that_looks_like_parameters():
    specs = tree()
    state = {
        "count": jax.ShapeDtypeStruct((), jnp.int32),
        "moments": specs,
        "rows": Leaf((2, 32), ("layers", "embed")),
        "nothing": None,
    }
    mesh = AbstractMesh(tuple(CUBE.values()), AXES)
    found = shardings(state, mesh, Rules())
    assert found["count"].spec == P()
    assert found["moments"] == shardings(specs, mesh, Rules())
    assert found["rows"].spec == P("stage", "fsdp")
    assert found["nothing"] is None
    assert [name for name, _ in named({"a": state})][:2] == [
        "a/moments/embedding/positions",
        "a/moments/embedding/tokens",
    ]
    with pytest.raises(ValueError, match=r"v \[3, 4\] has no logical axes; only a scalar can do without"):
        shardings({"v": jax.ShapeDtypeStruct((3, 4), jnp.float32)}, mesh, Rules())
    with pytest.raises(ValueError, match=r"v \[3, 4\] has no logical axes"):
        check({"v": jax.ShapeDtypeStruct((3, 4), jnp.float32)}, mesh, Rules())


def test_shards_on_devices_have_the_declared_sizes(devices):
    specs, rules = {"w": ParamSpec((6, 4, 5), ("embed", "heads", "head_size"), Normal(1.0))}, Rules()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    check(specs, mesh, rules)
    w = jax.device_put(np.zeros((6, 4, 5)), shardings(specs, mesh, rules)["w"])
    assert {s.data.shape for s in w.addressable_shards} == {(3, 2, 5)}


def test_layers_lie_on_stages_and_tokens_on_the_sequence_axis(devices):
    mesh, rules = make_mesh(MeshConfig(stage=2, fsdp=2, sequence=2)), Rules()
    specs = {"w": ParamSpec((4, 6, 5), ("layers", "embed", "head_size"), Normal(1.0))}
    check(specs, mesh, rules, rows=4, activations={"length": 6})
    w = jax.device_put(np.arange(4 * 6 * 5.0).reshape(4, 6, 5), shardings(specs, mesh, rules)["w"])
    assert {s.data.shape for s in w.addressable_shards} == {(2, 3, 5)}
    # The first four devices are the first stage.
    assert [s.index[0].start or 0 for s in w.addressable_shards] == [0] * 4 + [2] * 4
    tokens = jax.device_put(np.zeros((4, 6)), batch_sharding(mesh, rules, ("batch", "length")))
    assert {s.data.shape for s in tokens.addressable_shards} == {(2, 3)}


def test_a_batch_lies_on_data_and_fsdp(devices):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharding = batch_sharding(mesh, Rules())
    ids = jax.device_put(np.arange(8), sharding)
    tokens = jax.device_put(np.zeros((8, 3)), sharding)
    assert {s.data.shape for s in tokens.addressable_shards} == {(2, 3)}
    # Devices along tensor are neighbours and see the same rows.
    assert [list(np.asarray(s.data)) for s in ids.addressable_shards] == [
        rows for rows in ([0, 1], [2, 3], [4, 5], [6, 7]) for _ in range(2)
    ]
    longer = Rules().with_activations(length="tensor")
    assert batch_sharding(mesh, longer, ("batch", "length")).spec == P(("data", "fsdp"), "tensor")
    assert batch_sharding(mesh, Rules(), ("batch", "length")).spec == P(("data", "fsdp"), "sequence")


def test_constrain_spreads_what_passes_through(devices):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spread = constrain(mesh, Rules())
    axes = ("batch", "length", "mlp")
    y = jax.jit(lambda x: spread(x, axes) * 1)(np.ones((4, 3, 6), np.float32))
    assert y.sharding.shard_shape(y.shape) == (1, 3, 3)
    # A gradient is spread the same way, and values do not change.
    g = jax.jit(jax.grad(lambda x: (spread(x, axes) ** 2).sum()))(np.full((4, 3, 6), 3.0, np.float32))
    np.testing.assert_array_equal(g, 6.0)
    # Sizes that do not divide are allowed inside a program: generation with three rows, a vocabulary of 7.
    odd = jax.jit(lambda x: spread(x, ("batch", "vocabulary")))(np.arange(21.0).reshape(3, 7))
    np.testing.assert_array_equal(odd, np.arange(21.0).reshape(3, 7))
    with pytest.raises(ValueError, match=r"an activation of shape \(4, 3\) needs 2 logical axes, got \('batch',\)"):
        spread(jnp.ones((4, 3)), ("batch",))
    with pytest.raises(ValueError, match=r"an activation .* has the logical axis 'widht'"):
        spread(jnp.ones((4, 3)), ("batch", "widht"))


def test_constrain_inside_a_shard_map_keeps_to_the_axes_that_are_left(devices):
    """A pipeline is manual over its own axis only; the blocks that it calls constrain as they do elsewhere."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spread = constrain(mesh, Rules())
    stage = lambda x: spread(x * 2, ("batch", "mlp"))
    x = np.arange(32.0).reshape(8, 4)
    f = jax.shard_map(stage, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
    y = jax.jit(f)(x)
    np.testing.assert_array_equal(y, 2 * x)
    assert y.sharding.spec == P(("data", "fsdp"), "tensor")
    everything = jax.shard_map(stage, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_array_equal(jax.jit(everything)(x), 2 * x)
    mapped = jax.jit(jax.vmap(lambda x: spread(x, ("batch", "mlp"))))(np.ones((3, 8, 4)))
    assert mapped.sharding.spec == P(None, ("data", "fsdp"), "tensor")


def test_constrain_is_static_and_nothing_on_one_device(devices):
    one, same = (constrain(make_mesh(MeshConfig(), devices[:1]), Rules()) for _ in range(2))
    assert one == same
    assert hash(one) == hash(same)
    x = jnp.ones((2, 3))
    assert one(x, ("batch", "embed")) is x


def test_check_needs_no_device_and_is_fast():
    """Eighty layers of 8192 on 4096 devices: sizes alone, milliseconds."""
    specs = tree(80, 8192, 64, 8, 128, 28672, 128256, 8192)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(specs, {"data": 2, "stage": 4, "fsdp": 64, "sequence": 1, "tensor": 8}, Rules(), rows=1024)
    with pytest.raises(ValueError, match=r"kv_heads = 8\) does not divide over tensor\(16\)"):
        check(specs, {**ONE, "data": 4, "fsdp": 64, "tensor": 16}, Rules(), rows=1024)
