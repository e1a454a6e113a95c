"""Quantised products against NumPy: float64, and int64 where both operands are integers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpar.pallas_kernels import formats
from jaxpar.pallas_kernels.formats import dequantise, get, quantise
from jaxpar.pallas_kernels.matmul import Operands, product_reference, quant_matmul
from jaxpar.pallas_kernels.matmul.products import product
from jaxpar.pallas_kernels.matmul.reference import integer_sums, scales

M, K, N = 24, 256, 40
INTEGERS = [
    ("int8_row", "int8_row"), ("int8_tensor", "int8_row"), ("int8_row", "int4_g128"), ("int4_g64", "int4_g64"),
    ("int8_g128", "int4_g32"),
]  # fmt: skip
FLOATS8 = [("fp8_e4m3_row", "fp8_e4m3_row"), ("fp8_e5m2_tensor", "fp8_e4m3_tensor")]
BLOCKS = [("mxfp8", "mxint8"), ("nvfp4", "nvfp4"), ("nvint4", "mxfp6")]
WEIGHTS = [(None, "int8_row"), (None, "int4_g128"), (None, "nvfp4")]
PAIRS = [*INTEGERS, *FLOATS8, *BLOCKS, *WEIGHTS]


def draw(kind: str, dtype=np.float32):
    """x [M, K], w [K, N] and dy [M, N], of no symmetry."""
    rng = np.random.default_rng(0)
    x, w, dy = (rng.standard_normal(shape) for shape in ((M, K), (K, N), (M, N)))
    if kind == "outliers":
        x[:, [5, 77]] *= 50
    if kind == "equal":
        x[:], w[:] = 1.5, -0.75
    if kind == "empty rows":
        x[3:9], w[:, 11] = 0, 0
    if kind == "huge":
        x *= 1e15
    return [jnp.asarray(a, dtype) for a in (x, w, dy)]


@partial(jax.jit, static_argnums=(2, 3))
def both(x, w, inputs, weights):
    """The operands, and their product."""
    a = x if inputs is None else quantise(x, inputs, -1)
    b = quantise(w, weights, -2)
    return a, b, product(a, b, (-1, -2), x.dtype)


def error(found, exact) -> float:
    found = np.asarray(found, np.float64)
    assert np.isfinite(found).all()
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def worst_row(found, exact) -> float:
    size = np.linalg.norm(exact, axis=1)
    off = np.linalg.norm(np.asarray(found, np.float64) - exact, axis=1)
    return float((off / np.where(size > 0, size, 1)).max())


@pytest.mark.parametrize(("inputs", "weights"), PAIRS, ids=str)
def test_products_are_those_of_the_values(inputs, weights):
    for kind in ("normal", "outliers", "equal", "empty rows", "huge"):
        x, w, _ = draw(kind)
        a, b, y = both(x, w, inputs, weights)
        exact = product_reference(a, b, (-1, -2))
        assert max(error(y, exact), worst_row(y, exact) / 3) < 1e-6, kind
        assert np.abs(exact).max() > 0.01


@pytest.mark.parametrize(("inputs", "weights"), [("nvint4", "nvfp4"), ("int8_row", "fp8_e4m3_row")])
def test_in_bfloat16_blocks_lose_nothing(inputs, weights):
    """Operands in bfloat16 are exact, sums are float32."""
    x, w, _ = draw("outliers", jnp.bfloat16)
    a, b, y = both(x, w, inputs, weights)
    assert y.dtype == jnp.float32
    assert error(y, product_reference(a, b, (-1, -2))) < 1e-6


def test_group_scales_in_bfloat16_round_the_weights_once():
    x, w, _ = draw("normal", jnp.bfloat16)
    a, b, y = both(x, w, None, "int4_g128")
    plain = error(x @ dequantise(b, jnp.bfloat16), product_reference(a, b, (-1, -2)))
    assert error(y, product_reference(a, b, (-1, -2))) < 1.5 * plain < 5e-3


@pytest.mark.quick
@pytest.mark.parametrize(("inputs", "weights"), [p for p in INTEGERS if "_g" not in p[0] + p[1]], ids=str)
def test_integers_are_exact(inputs, weights):
    x, w, _ = draw("normal")
    a, b, y = both(x, w, inputs, weights)
    sums = integer_sums(a, b, (-1, -2))
    assert np.abs(sums).max() > 1000
    # float32 holds these sums, and the scales are multiplied in this order.
    expected = (sums.astype(np.float32) * np.asarray(a.scales)) * np.asarray(b.scales)
    np.testing.assert_array_equal(np.asarray(y), expected)


def test_groups_of_integers_are_exact_but_for_their_sum():
    x, w, _ = draw("normal")
    a, b, y = both(x, w, "int8_g128", "int4_g32")
    cut = lambda q, i: np.asarray(dequantise(q), np.float64) / scales(q)
    whole_a, whole_b = np.rint(cut(a, 0)), np.rint(cut(b, 0))
    exact = sum(
        (whole_a[:, g : g + 32] @ whole_b[g : g + 32]) * scales(a)[:, g : g + 1] * scales(b)[g : g + 1]
        for g in range(0, K, 32)
    )
    assert error(y, exact) < 3e-7


@pytest.mark.quick
def test_a_sum_that_int32_cannot_hold_is_refused():
    q = jax.eval_shape(lambda: quantise(jnp.zeros((2, 2**17)), "int8_row"))
    with pytest.raises(ValueError, match=r"131072 products of int8_row and int8_row may reach 2147483648.*int8_g128"):
        jax.eval_shape(lambda a: product(a, a, (-1, -1), jnp.float32), q)


@pytest.mark.parametrize(
    ("operands", "gradients"),
    [(("mxfp8", "mxint8"), "mxfp8_e5m2"), (("int8_row", "int8_row"), "int8_row")],
)
def test_gradients_are_those_of_six_quantisations(operands, gradients):
    """Straight through the rounding; each operand along what its product sums over."""
    x, w, dy = draw("outliers")
    x, dy = (jnp.concatenate([a, 2 * a])[:32] for a in (x, dy))
    w, dy = w[:, :32], dy[:, :32]
    inputs, weights = map(get, operands)
    back = get(gradients)
    how = Operands(inputs, weights, back)

    @jax.jit
    def run(x, w, dy):
        y, pull = jax.vjp(partial(quant_matmul, operands=how), x, w)
        return y, *pull(dy)

    y, dx, dw = run(x, w, dy)
    assert error(y, product_reference(quantise(x, inputs, -1), quantise(w, weights, -2), (-1, -2))) < 1e-6
    assert error(dx, product_reference(quantise(dy, back, -1), quantise(w, back, -1), (-1, -1))) < 1e-6
    assert error(dw, product_reference(quantise(x, back, -2), quantise(dy, back, -2), (-2, -2))) < 1e-6


@pytest.mark.quick
def test_without_formats_it_is_the_plain_product():
    x, w, dy = draw("normal")
    y, pull = jax.vjp(quant_matmul, x, w)
    dx, dw = pull(dy)
    for found, exact in ((y, x @ w), (dx, dy @ w.T), (dw, x.T @ dy)):
        np.testing.assert_allclose(np.asarray(found), np.asarray(exact), rtol=1e-5, atol=1e-4)


@pytest.mark.quick
def test_quantised_weights_give_gradients_of_activations():
    """As the product with their values does; they have none themselves."""
    x, w, dy = draw("normal")
    q = quantise(w, "int4_g64", 0)
    how = Operands(inputs=get("int8_row"))
    weighted = lambda x, q: jnp.sum(quant_matmul(x, q, how) * dy)
    dx, dq = jax.jit(jax.grad(weighted, argnums=(0, 1), allow_int=True))(x, q)
    assert error(dx, product_reference(dy, dequantise(q), (-1, -1))) < 1e-6
    assert not np.asarray(dq.scales).any()


def test_shapes_of_projections_and_stacked_layers():
    """[D, H, K] and [H, K, D] kernels, scanned over layers, are the products with their values."""
    rng = np.random.default_rng(0)
    D, H, S, L = 64, 4, 16, 3
    x = jnp.asarray(rng.standard_normal((2, 5, D)), jnp.float32)
    query = jnp.asarray(rng.standard_normal((L, D, H, S)), jnp.float32)
    out = jnp.asarray(rng.standard_normal((L, H, S, D)), jnp.float32)
    for name in ("int4_g32", "nvint4"):
        qs = quantise(query, name, axis=1, stacked=1)
        os = quantise(out.reshape(L, H * S, D), name, axis=1, stacked=1)

        def layer(x, kernels):
            h = quant_matmul(x, kernels[0])
            return quant_matmul(h, kernels[1], contract=2), h

        _, hidden = jax.jit(lambda x, qs=qs, os=os, layer=layer: jax.lax.scan(layer, x, (qs, os)))(x)
        expected = np.asarray(x, np.float64)
        for i in range(L):
            h = np.einsum("btd,dhk->bthk", expected, np.asarray(dequantise(qs)[i], np.float64))
            assert hidden[i].shape == h.shape
            assert error(hidden[i], h) < 1e-6
            expected = np.einsum("btn,nd->btd", h.reshape(2, 5, -1), np.asarray(dequantise(os)[i], np.float64))


@pytest.mark.parametrize(
    ("split", "names"), [("outputs", ("int8_row", "int4_g32", None)), ("sums", ("mxfp8", "mxfp8", "mxfp8"))], ids=str
)
def test_under_tensor_sharding_it_is_the_same(split, names, devices):
    """Column and row parallel kernels, by the partitioner; quantised weights are split as they are."""
    mesh = Mesh(np.asarray(devices[:4]), ("tensor",))
    x, w, dy = draw("normal")
    x, dy = x[:16].repeat(2, 0), dy[:16].repeat(2, 0)
    w, dy = jnp.tile(w, (1, 4))[:, :128], jnp.tile(dy, (1, 4))[:, :128]
    how = Operands(*(None if n is None else get(n) for n in names))
    place = P(None, "tensor") if split == "outputs" else P("tensor")
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    run = jax.jit(
        lambda x, w, dy: (lambda y, pull: (y, *pull(dy)))(*jax.vjp(partial(quant_matmul, operands=how), x, w))
    )
    expected = run(x, w, dy)
    spread = P(None, "tensor") if split == "sums" else P()
    for a, b in zip(run(put(x, spread), put(w, place), put(dy, P())), expected, strict=True):
        assert error(a, np.asarray(b, np.float64)) < 1e-6
    fixed = quantise(w, names[1], 0)
    q = jax.tree.map(lambda leaf: put(leaf, place), fixed)
    one = jax.jit(lambda x, q: quant_matmul(x, q, Operands(inputs=how.inputs)))
    assert error(one(put(x, spread), q), np.asarray(one(x, fixed), np.float64)) < 1e-6


@pytest.mark.parametrize("name", ["mxfp8_e5m2", "nvfp4"])
def test_the_scaled_product_of_xla_is_ours(name):
    if not hasattr(jax.lax, "scaled_dot"):
        pytest.skip(f"JAX {jax.__version__} has no jax.lax.scaled_dot")
    x, w, dy = (jnp.tile(a, (4, 1))[:32] if a.shape[0] == M else a[:, :32] for a in draw("outliers"))
    dy = dy[:, :32]
    how = Operands(get(name), get(name), get(name))

    @jax.jit
    def run(x, w, dy):
        found = []
        for name in ("scaled_dot", "xla"):
            y, pull = jax.vjp(partial(quant_matmul, operands=how, implementation=name), x, w)
            found.append((y, *pull(dy)))
        return found

    for a, b in zip(*run(x, w, dy), strict=True):
        assert error(a, np.asarray(b, np.float64)) < 1e-6


def test_rotation_leaves_the_product_and_helps_integers_with_outliers():
    x, w, dy = draw("outliers")
    exact = product_reference(x, w, (-1, -2))
    losses = {}
    for rotate in (None, 32):
        y, pull = jax.vjp(lambda x, w, r=rotate: quant_matmul(x, w, Operands(rotate=r)), x, w)
        assert error(y, exact) < 1e-6
        assert error(pull(dy)[0], product_reference(dy, w, (-1, -1))) < 1e-6
        losses[rotate] = error(quant_matmul(x, w, Operands(get("int4_g32"), get("int4_g32"), rotate=rotate)), exact)
    assert losses[32] < 0.8 * losses[None]
    how = Operands(inputs=get("int4_g32"), rotate=32)
    fixed = quantise(how.rotated(w, -2), "int4_g32", 0)
    assert error(quant_matmul(x, fixed, how), exact) == pytest.approx(losses[32], rel=1e-5)
    _, pull = jax.vjp(lambda x: quant_matmul(x, fixed, Operands(rotate=32)), x)
    assert error(*pull(dy), product_reference(dy, w, (-1, -1))) < 0.2


@pytest.mark.quick
def test_every_input_matters():
    """A product that left a block, a scale or a row out would not move as the values do."""
    x, w, _ = draw("normal")
    base = np.asarray(quant_matmul(x, w, Operands(get("mxint8"), get("int4_g32"))), np.float64)
    for at in (0, 31, 32, K - 1):
        moved = np.asarray(quant_matmul(x.at[:, at].add(3.0), w, Operands(get("mxint8"), get("int4_g32"))), np.float64)
        expected = 3.0 * np.asarray(w[at], np.float64)[None]
        assert error(moved - base, np.broadcast_to(expected, base.shape)) < 0.25


@pytest.mark.quick
def test_a_block_that_is_not_finite_shows():
    x, w, _ = draw("normal")
    y = jax.jit(lambda x, w: quant_matmul(x, w, Operands(get("mxfp8"), get("mxfp8"))))(x.at[2, 40].set(np.inf), w)
    bad = np.isnan(np.asarray(y))
    assert bad.sum() == bad[2].sum() == N


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, w: quant_matmul(x, w[:128]), "256 and 128 values"),
        (lambda x, w: quant_matmul(x[:, :100], w[:100], Operands(get("mxint8"))), "inputs: mxint8 .* 96 or 128"),
        (lambda x, w: quant_matmul(x, w, Operands(gradients=get("mxfp8"))), "summed over outputs: mxfp8.* 40 .* 32 or 64"),
        (lambda x, w: quant_matmul(x, quantise(w, "mxint8", 0), Operands(weights=get("mxfp8"))), "already"),
        (lambda x, w: quant_matmul(x, quantise(w[:, :32], "mxint8", 1)), "along axis -1; a product sums over axis -2"),
        (lambda x, w: quant_matmul(x, w, implementation="cublas"), "unknown .*'cublas'.*; choose one of 'xla'"),
        (lambda x, w: quant_matmul(x, w, implementation="scaled_dot"), "inputs are in no number format"),
        (
            lambda x, w: quant_matmul(x, w, Operands(get("mxint8"), get("mxfp8")), implementation="scaled_dot"),
            "inputs are mxint8; use implementation=.xla.",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(call, words):
    x, w, _ = draw("normal")
    with pytest.raises(ValueError, match=words):
        call(x, w)


@pytest.mark.quick
def test_formats_split_into_what_is_summed_and_what_is_not():
    x, _, _ = draw("normal")
    for name in ("mxint6", "nvfp4", "int8_row", "int4_g32"):
        q = quantise(x, name)
        inside, outside = formats.split(q, jnp.bfloat16)
        # Before NVFP4's tensor scale and behind float32 scales of groups, bfloat16 is exact.
        value = np.asarray(inside, np.float64) * (1 if outside is None else np.asarray(outside, np.float64))
        exact = (
            scales(q) * q.format.element.values()[np.asarray(formats.packing.unpack(q.codes, q.format.stored_bits, -1))]
        )
        assert error(value, exact) < (3e-3 if "_g" in name else 1e-7), name
