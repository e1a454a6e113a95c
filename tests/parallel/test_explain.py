"""`explain`: bytes are those on the devices, collectives those that the compiler makes, and the table says both."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_tree import tree

from jaxpar.models import spec
from jaxpar.models.spec import Normal, ParamSpec, map_specs
from jaxpar.parallel.explain import explain, notation, size, table
from jaxpar.parallel.mesh import MeshConfig, make_mesh
from jaxpar.parallel.rules import Rules, batch_sharding, constrain, shardings
from jaxpar.parallel.sequence.choose import Workload, bytes_per_link
from jaxpar.parallel.tensor.config import TensorConfig

ONE = MeshConfig().sizes
CUBE = MeshConfig(data=2, fsdp=2, tensor=2).sizes
LAYERS, ROWS, LENGTH = 3, 8, 16
SPECS = tree(layers=LAYERS, context=LENGTH)


def row(explanation, name):
    (found,) = [p for p in explanation.record["parameters"] if p["name"] == name]
    return found


@pytest.mark.quick
@pytest.mark.parametrize(
    ("axes", "shape", "kind", "expected"),
    [
        (("layers", "embed", "heads", "head_size"), (3, 32, 4, 5), "params", "[L, D_fsdp, H_tensor, K]"),
        (("vocabulary", "embed"), (40, 32), "params", "[V_tensor, D_fsdp]"),
        ((None, "norm"), (7, 32), "params", "[7, 32]"),
        (("batch", "length", "mlp"), (8, 16, 24), "activations", "[B_{data,fsdp}, T, F_tensor]"),
    ],
)
def test_notation(axes, shape, kind, expected):
    assert notation(axes, Rules(), CUBE, shape, kind) == expected


@pytest.mark.quick
def test_notation_of_stages_and_the_sequence():
    sizes = MeshConfig(stage=2, fsdp=2, sequence=2).sizes
    assert notation(("layers", "embed", "mlp"), Rules(), sizes) == "[L_stage, D_fsdp, F]"
    assert notation(("batch", "length", "mlp"), Rules(), sizes, kind="activations") == "[B_fsdp, T_sequence, F]"


@pytest.mark.quick
def test_notation_leaves_out_axes_of_one_device():
    assert notation(("embed", "mlp"), Rules(), {**ONE, "data": 8}) == "[D, F]"


@pytest.mark.quick
def test_one_kernel_by_hand():
    """[3, 32, 4, 5] float32 over fsdp(2) and tensor(2), in a mesh of 8: every number counted by hand."""
    found = row(explain(SPECS, CUBE, Rules()), "layers/attention/query/kernel")
    assert found["notation"] == "kernel[L, D_fsdp, H_tensor, K]"
    assert found["spec"] == [["stage"], ["fsdp"], ["tensor"], []]
    assert found["bytes_per_device"] == 3 * 16 * 2 * 5 * 4
    layer = 32 * 2 * 5 * 4  # gathered over fsdp, still cut by tensor
    common = {"group": 2, "where": "layers/attention/query/kernel"}
    assert found["collectives"] == [
        {"op": "all-gather", "axes": ["fsdp"], "bytes": layer, "times": 6, "sent_bytes_per_step": 6 * layer // 2, **common},
        {"op": "reduce-scatter", "axes": ["fsdp"], "bytes": layer, "times": 3, "sent_bytes_per_step": 3 * layer // 2, **common},
        {"op": "all-reduce", "axes": ["data"], "bytes": layer // 2, "times": 3, "sent_bytes_per_step": 3 * layer // 2, **common},
    ]  # fmt: skip


@pytest.mark.quick
def test_totals_and_optimiser():
    every = explain(SPECS, CUBE, Rules())
    held = every.record["bytes_per_device"]
    assert held["parameters"] == sum(p["bytes_per_device"] for p in every.record["parameters"])
    assert held["gradients"] == held["parameters"]
    assert held["optimiser"] == 2 * held["parameters"]
    halves = map_specs(lambda s: ParamSpec(s.shape, s.axes, s.init, "bfloat16"), SPECS)
    state = {"count": jax.ShapeDtypeStruct((), jnp.int32), "momentum": halves}
    other = explain(SPECS, CUBE, Rules(), optimiser=state).record["bytes_per_device"]
    assert other["optimiser"] == held["parameters"] // 2


@pytest.mark.quick
def test_one_device_sends_nothing():
    alone = explain(SPECS, ONE, Rules(), rows=ROWS, length=LENGTH)
    assert alone.record["sent_bytes_per_step"] == 0
    assert alone.record["activations"] == []
    assert all(p["collectives"] == [] for p in alone.record["parameters"])
    assert "mesh: data(1) = 1 device\n" in alone.text


@pytest.mark.quick
def test_each_axis_costs_what_it_is_known_for():
    def ops(**sizes):
        e = explain(SPECS, MeshConfig(**sizes), Rules(), rows=ROWS, length=LENGTH)
        weights = {(c["op"], *c["axes"]) for p in e.record["parameters"] for c in p["collectives"]}
        return weights, {(c["op"], *c["axes"]) for c in e.record["activations"]}

    assert ops(data=8) == ({("all-reduce", "data")}, set())
    assert ops(fsdp=8)[0] >= {("all-gather", "fsdp"), ("reduce-scatter", "fsdp")}
    assert ops(tensor=2) == (set(), {("all-reduce", "tensor")})
    assert ops(stage=3) == (set(), {("collective-permute", "stage")})
    assert ops(sequence=4) == ({("all-reduce", "sequence")}, {("collective-permute", "sequence")})
    assert ops(data=2, sequence=4)[0] == {("all-reduce", "data", "sequence")}
    # Two all-reduces of [B, T, D] a layer forward and two backward, one for the embedding, one for the head.
    e = explain(SPECS, MeshConfig(tensor=2), Rules(), rows=ROWS, length=LENGTH, compute_dtype="bfloat16")
    assert sum(c["times"] for c in e.record["activations"]) == 4 * LAYERS + 2
    assert {c["bytes"] for c in e.record["activations"]} == {ROWS * LENGTH * 32 * 2}
    forward = [c for c in e.record["activations"] if c["where"].startswith("forward")]
    assert sum(c["times"] for c in forward) == 2 * LAYERS + 1


@pytest.mark.quick
def test_each_form_of_products_sends_what_it_is_known_for():
    """A reduce-scatter and an all-gather send what an all-reduce does; a ring as much, but for sums in float32."""

    def of(products, dtype="float32"):
        told = dict(rows=ROWS, length=LENGTH, compute_dtype=dtype, tensor=TensorConfig(products))
        e = explain(SPECS, MeshConfig(tensor=4), Rules(), **told)
        layers = [c for c in e.record["activations"] if "layers/" in c["where"]]
        sent = lambda which: sum(c["sent_bytes_per_step"] for c in layers if c["where"].startswith(which))
        return {c["op"] for c in layers}, sent("forward"), sent("backward"), "the partitioner" in e.text

    ops, forward, backward, _ = of("whole")
    assert ops == {"all-reduce"}
    spread = {"all-gather", "reduce-scatter"}
    # Backward by hand gathers a branch's tokens once more: half an all-reduce.
    assert of("sharded") == (spread, forward, backward, True)
    assert of("gathered") == of("weave") == (spread, forward, backward * 3 // 2, False)
    assert of("ring") == ({"collective-permute"}, forward, backward * 3 // 2, False)
    assert of("ring", "bfloat16")[1] == of("gathered", "bfloat16")[1] * 3 // 2


@pytest.mark.quick
def test_a_stage_holds_its_layers_and_works_on_no_others():
    deep = tree(layers=4, context=LENGTH)
    told = dict(rows=ROWS, length=LENGTH, compute_dtype="bfloat16")
    whole = explain(deep, MeshConfig(fsdp=2, tensor=2), Rules(), **told)
    half = explain(deep, MeshConfig(stage=2, fsdp=2, tensor=2), Rules(), **told)
    for name in spec.flatten(deep):
        before, after = row(whole, name), row(half, name)
        times = lambda r: [(c["op"], c["axes"], c["bytes"], c["times"]) for c in r["collectives"]]
        stages = 2 if name.startswith("layers/") else 1
        assert after["bytes_per_device"] * stages == before["bytes_per_device"], name
        assert times(before) == [(*c, n * stages) for *c, n in times(after)], name
    inside = lambda e: sum(c["times"] for c in e.record["activations"] if "layers/" in c["where"])
    assert 2 * inside(half) == inside(whole) == 4 * 4


@pytest.mark.quick
@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_pipeline_sends_activations_to_the_neighbour(microbatches):
    mesh = MeshConfig(stage=3, fsdp=2)
    e = explain(SPECS, mesh, Rules(), rows=ROWS, length=LENGTH, microbatches=microbatches, compute_dtype="bfloat16")
    nbytes = ROWS // 2 * LENGTH * 32 * 2  # the rows of a device, whatever their number of microbatches
    common = {"op": "collective-permute", "axes": ["stage"], "group": 3, "bytes": nbytes // microbatches}
    common |= {"times": microbatches, "sent_bytes_per_step": nbytes}
    assert e.record["activations"] == [
        {**common, "where": "forward to the next stage"},
        {**common, "where": "backward to the stage before"},
    ]
    (forward,) = [line for line in e.text.splitlines() if line.startswith("forward to the next stage ")]
    assert [c.strip() for c in forward.split("|")][1:3] == ["CP", str(microbatches)]
    assert f"over stage: a stage in the middle, {microbatches} microbatch" in e.text
    assert "over sequence" not in e.text


@pytest.mark.quick
@pytest.mark.parametrize("sizes", [{"sequence": 4}, {"data": 2, "stage": 3, "sequence": 2, "tensor": 2}], ids=str)
def test_keys_and_values_go_round_a_ring(sizes):
    mesh = MeshConfig(**sizes)
    e = explain(SPECS, mesh, Rules(), rows=ROWS, length=LENGTH, compute_dtype="bfloat16")
    found = [c for c in e.record["activations"] if c["axes"] == ["sequence"]]
    assert {c["op"] for c in found} == {"collective-permute"}
    assert {c["times"] for c in found} == {LAYERS // mesh.stage * (mesh.sequence - 1)}
    assert {c["where"].split()[-2].rstrip(",") for c in found} == {
        "layers/attention/key/kernel",
        "layers/attention/value/kernel",
    }
    work = Workload(LENGTH, 4 // mesh.tensor, 2 // mesh.tensor, 5, mesh.sequence, itemsize=2, batch=ROWS // mesh.data)
    passes = sum(bytes_per_link("ring", work, backward=backward).total for backward in (False, True))
    assert sum(c["sent_bytes_per_step"] for c in found) == LAYERS // mesh.stage * passes
    assert "over sequence: attention as a ring" in e.text
    # Other activations are shorter by as much.
    alone = explain(SPECS, MeshConfig(tensor=2), Rules(), rows=ROWS, length=LENGTH).record["activations"]
    both = explain(SPECS, MeshConfig(sequence=4, tensor=2), Rules(), rows=ROWS, length=LENGTH).record["activations"]
    assert [c["bytes"] for c in alone] == [4 * c["bytes"] for c in both if c["op"] == "all-reduce"]


@pytest.mark.quick
def test_tokens_that_lie_whole_go_round_no_ring():
    e = explain(SPECS, MeshConfig(sequence=4), Rules().with_activations(length=()), rows=ROWS, length=LENGTH)
    assert e.record["sent_bytes_per_step"] == 0


@pytest.mark.quick
def test_a_tied_table_is_also_the_output_projection():
    tied = {**SPECS, "head": {"norm": SPECS["head"]["norm"]}}
    e = explain(tied, CUBE, Rules(), rows=ROWS, length=LENGTH)
    assert row(e, "embedding/tokens")["collectives"][0]["times"] == 2
    assert row(explain(SPECS, CUBE, Rules()), "embedding/tokens")["collectives"][0]["times"] == 1
    assert "backward embedding/tokens as the output projection" in [c["where"] for c in e.record["activations"]]


@pytest.mark.quick
def test_the_text_has_a_line_for_every_parameter():
    e = explain(SPECS, CUBE, Rules(), rows=ROWS, length=LENGTH)
    lines = e.text.splitlines()
    assert [c.strip() for c in lines[0].split("|")] == [
        "parameter", "logical axes", "PartitionSpec", "a device", "collectives a step",
    ]  # fmt: skip
    (query,) = [line for line in lines if line.startswith("layers/attention/query/kernel ")]
    assert [c.strip() for c in query.split("|")] == [
        "layers/attention/query/kernel",
        "[L, D_fsdp, H_tensor, K]",
        "P(stage, fsdp, tensor, -)",
        "1.9 KiB",
        "6 AG(fsdp), 3 RS(fsdp), 3 AR(data)",
    ]
    for name in spec.flatten(SPECS):
        assert sum(line.startswith(f"{name} ") for line in lines) == 1
    assert "mesh: data(2) × fsdp(2) × tensor(2) = 8 devices" in e.text
    assert "H heads = 4" in e.text
    assert "over s" not in e.text  # nothing is said of axes that are not used
    assert json.loads(json.dumps(e.record)) == e.record


@pytest.mark.quick
def test_sizes_and_columns():
    assert [size(n) for n in (0, 1023, 1024, 1536, 2**20 * 5, 2**41)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 MiB", "2.0 TiB",
    ]  # fmt: skip
    assert table(("a", "bb"), [("ccc", "1"), ("d", "22")], right=(1,)) == "a   | bb\n----+---\nccc |  1\nd   | 22"


def loss(spread, params, tokens):
    """A stand-in for a decoder on the example tree: each kernel is used as a decoder uses it."""

    def read(name):
        return spread(params["embedding"][name], ({"tokens": "vocabulary"}.get(name), "embed"))

    x = read("tokens")[tokens] + read("positions")[tokens % LENGTH]
    x = spread(x, ("batch", "length", "embed"))

    def block(x, p):
        a, f = p["attention"], p["feedforward"]
        h = x * a["norm"]["scale"][None, None] + a["norm"]["bias"][None, None]
        heads = lambda name, axis: spread(
            jnp.einsum("btd,dhk->bthk", h, a[name]["kernel"]), ("batch", "length", axis, "head_size")
        )
        q = (heads("query", "heads") + a["query"]["bias"][None, None]) * a["query_norm"]["scale"][None, None, None]
        k, v = (jnp.repeat(heads(n, "kv_heads"), 2, axis=2) for n in ("key", "value"))
        y = jnp.einsum("bthk,hkd->btd", jnp.tanh(q * k) * v, a["out"]["kernel"])
        x = x + spread(y, ("batch", "length", "embed"))
        h = x * f["norm"]["scale"][None, None]
        gate, up = (spread(h @ f[n]["kernel"], ("batch", "length", "mlp")) for n in ("gate", "up"))
        y = (jnp.tanh(gate) * up) @ f["down"]["kernel"]
        return x + spread(y, ("batch", "length", "embed")), None

    x, _ = jax.lax.scan(block, x, params["layers"])
    logits = (x * params["head"]["norm"]["scale"][None, None]) @ params["head"]["unembed"]["kernel"]
    return jax.nn.logsumexp(spread(logits, ("batch", "length", "vocabulary")), axis=-1).sum()


@pytest.fixture(scope="module")
def compiled(devices):
    """The gradient of `loss` on data(2) × fsdp(2) × tensor(2), and the parameters that go in."""
    return compile_on(MeshConfig(data=2, fsdp=2, tensor=2))


def compile_on(cfg):
    mesh, rules = make_mesh(cfg), Rules()
    declared = shardings(SPECS, mesh, rules)
    params = jax.tree.map(
        lambda s, place: jax.device_put(np.zeros(s.shape, np.float32), place),
        spec.abstract(SPECS),
        declared,
    )
    tokens = jax.device_put(np.zeros((ROWS, LENGTH), np.int32), batch_sharding(mesh, rules))
    gradient = jax.jit(jax.value_and_grad(partial(loss, constrain(mesh, rules))), out_shardings=(None, declared))
    return gradient.lower(params, tokens).compile(), params


def test_bytes_are_those_on_a_device(compiled):
    _, params = compiled
    e = explain(SPECS, CUBE, Rules())
    for name in spec.flatten(SPECS):
        leaf = params
        for part in name.split("/"):
            leaf = leaf[part]
        assert {s.data.nbytes for s in leaf.addressable_shards} == {row(e, name)["bytes_per_device"]}, name


def test_bytes_of_layers_on_stages(devices):
    deep, mesh, rules = tree(layers=4), make_mesh(MeshConfig(stage=4, fsdp=2)), Rules()
    e = explain(deep, mesh, rules)
    for name, leaf in spec.flatten(deep).items():
        (place,) = shardings([leaf], mesh, rules)
        held = jax.device_put(np.zeros(leaf.shape, np.float32), place).addressable_shards
        assert {s.data.nbytes for s in held} == {row(e, name)["bytes_per_device"]}, name


@pytest.mark.parametrize("cfg", [MeshConfig(fsdp=2, sequence=4), MeshConfig(data=2, fsdp=2, sequence=2)], ids=str)
def test_the_compiler_sums_weights_over_the_sequence_too(cfg, devices):
    """The stand-in mixes no tokens: what is left over `sequence` are the sums of gradients."""
    e = explain(SPECS, cfg, Rules(), rows=ROWS, length=LENGTH, compiled=compile_on(cfg)[0])

    def payload(found, op, axes):
        inside = [c for c in found if c["op"] == op and c["axes"] == axes and c["times"] % LAYERS == 0]
        return sum(c["bytes"] * c["times"] for c in inside)

    derived = [c for p in e.record["parameters"] for c in p["collectives"]]
    made = e.record["compiled"]["collectives"]
    rows = [a for a in ("data", "fsdp") if cfg.sizes[a] > 1]
    kernels = [a for a in ("data", "sequence") if cfg.sizes[a] > 1]
    # Vectors: XLA:CPU sums over rows and over tokens one after the other.
    vectors = payload(derived, "all-reduce", [*rows, "sequence"])
    assert vectors > 0
    expected = {
        ("all-gather", "fsdp"): payload(derived, "all-gather", ["fsdp"]),
        ("all-reduce", "fsdp"): payload(derived, "reduce-scatter", ["fsdp"]),
        ("all-reduce", *kernels): payload(derived, "all-reduce", kernels),
    }
    assert all(expected.values())
    for apart in (rows, ["sequence"]):
        expected[("all-reduce", *apart)] = expected.get(("all-reduce", *apart), 0) + vectors
    assert {(op, *axes): payload(made, op, axes) for op, *axes in expected} == expected


def test_the_compiler_makes_the_collectives_that_the_rules_imply(compiled):
    e = explain(SPECS, CUBE, Rules(), rows=ROWS, length=LENGTH, compiled=compiled[0])
    derived = [c for p in e.record["parameters"] for c in p["collectives"]]
    made = e.record["compiled"]["collectives"]
    assert e.record["compiled"]["unknown_loops"] == 0
    assert {c["op"] for c in made} == {"all-gather", "all-reduce"}  # XLA:CPU: a reduce-scatter is all-reduce and slice

    def payload(found, op, axes, in_loop):
        return sum(
            c["bytes"] * c["times"]
            for c in found
            if c["op"] == op
            and (axes is None or c["axes"] == axes.split("+"))
            and (c["times"] % LAYERS == 0) == in_loop
        )

    # In the loop over layers, forward and backward: byte for byte.
    for op, axes, compiled_op in (
        ("all-gather", "fsdp", "all-gather"),
        ("reduce-scatter", "fsdp", "all-reduce"),
        ("all-reduce", "data", "all-reduce"),
        ("all-reduce", "data+fsdp", "all-reduce"),
    ):
        expected = payload(derived, op, axes, True)
        assert expected > 0
        assert payload(made, compiled_op, axes, True) == expected, (op, axes)
    each = ROWS * LENGTH * 32 * 4 // 4
    assert payload(e.record["activations"], "all-reduce", "tensor", True) == 4 * LAYERS * each
    # Backward, XLA:CPU sums query, key, value and gate, up one by one: five in place of two. And the gradient of
    # query_norm (20 bytes) is a sum over heads.
    assert payload(made, "all-reduce", "tensor", True) == (2 + 5) * LAYERS * each + LAYERS * 20
    # Outside the loop. The head's forward and backward pass are neighbours in time: its kernel is gathered once.
    head, tables = 40 // 2 * 32 * 4, (40 // 2 + LENGTH) * 32 * 4
    assert payload(made, "all-gather", None, False) == head + tables
    # A gradient scattered into a table is summed whole; with it the final norm's and the loss.
    assert payload(made, "all-reduce", "data+fsdp", False) == tables + 32 * 4 + 4
    softmax = 2 * ROWS * LENGTH * 4 // 4
    assert payload(e.record["activations"], "all-reduce", "tensor", False) == 2 * each
    assert payload(made, "all-reduce", "tensor", False) == 2 * each + softmax
    assert "compiled collective" in e.text


@pytest.mark.quick
def test_a_rule_of_the_users_own():
    """A parameter axis that activations do not have on the same mesh axis is gathered, whatever it is called."""
    rules = Rules().with_params(experts="tensor").with_activations(experts=())
    specs = {"w": ParamSpec((4, 32), ("experts", "embed"), Normal(1.0))}
    (gather, *_) = row(explain(specs, CUBE, rules), "w")["collectives"]
    assert (gather["op"], gather["axes"]) == ("all-gather", ["tensor", "fsdp"])
