"""Which implementation a call gets: by name, by shape, by platform, and by a platform known only when it is lowered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from jaxpar.pallas_kernels import tiles, versions
from jaxpar.pallas_kernels.attention import ATTENTION, MaskSpec, attention
from jaxpar.pallas_kernels.dispatch import Implementation, Op, explain

V5E = AbstractDevice("TPU v5 lite", 1, "tpu")
H200 = AbstractDevice("NVIDIA H200", 132, "gpu")

pytestmark = pytest.mark.quick


def on(device):
    """A scope that is traced for this device."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def even(x, **_):
    return f"takes an even length, got {x.shape[0]}" if x.shape[0] % 2 else None


OP = Op(
    "wave",
    (
        Implementation("mosaic_tpu", jnp.sin, even, platform="tpu", kernel=True),
        Implementation("mosaic_gpu", jnp.sinh, platform="cuda", unwise=lambda x: "is slow", kernel=True),
        Implementation("xla", jnp.cos),
    ),
)


def wave(x, implementation=None, **more):
    return OP.choose(implementation, x, **more).call(lambda one: one.run, x)


def test_a_name_works_or_says_why_not():
    x = jnp.ones(4)
    np.testing.assert_allclose(wave(x, "xla"), np.cos(np.ones(4)), atol=1e-6)
    np.testing.assert_allclose(wave(x, "mosaic_tpu", interpret=True), np.sin(np.ones(4)), atol=1e-6)
    for name, size, more, words in [
        (
            "mosaic",
            4,
            {},
            "unknown wave implementation 'mosaic'; choose one of 'xla', 'mosaic_gpu', 'mosaic_tpu', or None",
        ),
        ("mosaic_tpu", 4, {}, 'runs on TPUs, and here are CPUs only; use implementation="xla"'),
        ("mosaic_tpu", 3, {}, "takes an even length, got 3"),
        ("mosaic_tpu", 3, {"interpret": True}, "takes an even length, got 3"),
        ("xla", 4, {"interpret": True}, "is no kernel that an interpreter could run"),
        (None, 4, {"interpret": True}, "needs the kernel's name"),
    ]:
        with pytest.raises(ValueError, match=words) as found:
            wave(jnp.ones(size), name, **more)
        assert "\n" not in str(found.value)


def test_none_takes_the_first_that_fits_the_platform_in_scope():
    chosen = lambda size: OP.choose(None, jax.ShapeDtypeStruct((size,), jnp.float32)).default.name
    assert chosen(4) == "xla"
    with on(V5E):
        assert chosen(4) == "mosaic_tpu"
        assert chosen(3) == "xla"
    with on(H200):
        assert chosen(4) == "xla"
        assert OP.choose("mosaic_gpu", jnp.ones(4)).default.name == "mosaic_gpu"


def test_explain_has_a_reason_for_each():
    reasons = lambda size: {
        v.name: (v.chosen, v.reason) for v in explain(OP, jax.ShapeDtypeStruct((size,), jnp.float32))
    }
    assert reasons(4) == {
        "mosaic_tpu": ((), "runs on TPUs, and here are CPUs only"),
        "mosaic_gpu": ((), "runs on NVIDIA GPUs, and here are CPUs only"),
        "xla": (("cpu",), "is chosen on CPUs"),
    }
    with on(V5E):
        assert reasons(4)["mosaic_tpu"] == (("tpu",), "is chosen on TPUs")
        assert reasons(4)["xla"] == ((), "comes after one that fits too")
        assert reasons(3)["mosaic_tpu"] == ((), "takes an even length, got 3")
    with on(H200):
        assert reasons(4)["mosaic_gpu"] == ((), "is slow")


def test_the_platform_may_be_known_only_when_it_is_lowered(monkeypatch):
    """One trace, lowered for two platforms: each gets its own implementation."""
    monkeypatch.setattr(versions, "platforms", lambda: ("cpu", "tpu"))
    monkeypatch.setattr(versions, "split_by_compiler", lambda: False)
    traced = jax.jit(wave).trace(jnp.ones(4))
    text = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu")}
    assert "cosine" in text["cpu"]
    assert "stablehlo.sine" not in text["cpu"]
    assert "stablehlo.sine" in text["tpu"]
    assert "cosine" not in text["tpu"]
    np.testing.assert_allclose(wave(jnp.ones(4)), np.cos(np.ones(4)), atol=1e-6)


def test_a_kernel_is_chosen_only_where_the_compiler_need_not_split_it(monkeypatch, devices):
    monkeypatch.setattr(versions, "platforms", lambda: ("tpu",))
    x = jnp.ones(8)
    assert OP.choose(None, x).default.name == "xla"
    assert "shard_map" in explain(OP, x)[0].reason
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    seen = []

    def inside(x):
        seen.append(OP.choose(None, x).default.name)
        return x

    for axes in ({"a", "b"}, {"a"}):
        spec = PartitionSpec("a")
        jax.eval_shape(jax.shard_map(inside, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=axes), x)
    assert seen == ["mosaic_tpu", "xla"]


def test_block_sizes_are_the_first_row_that_fits():
    table = (
        tiles.Row(64, chips=("v5e",), most=(("head_size", 128),)),
        tiles.Row(32, chips=("v5e", "v6e")),
        tiles.Row(16),
    )
    assert tiles.look_up(table, "TPU v5 lite", head_size=128) == 64
    assert tiles.look_up(table, "TPU v5 lite", head_size=256) == 32
    assert tiles.look_up(table, "TPU v6 lite", head_size=64) == 32
    assert tiles.look_up(table, "TPU v5", head_size=64) == 16
    assert tiles.look_up(table, None, head_size=64) == 16
    assert [tiles.chip(k) for k in ("TPU v5", "TPU7x", "NVIDIA H200", "cpu")] == ["v5p", "tpu7x", "hopper", None]
    with pytest.raises(ValueError, match="no row of the table fits"):
        tiles.look_up(table[:1], "TPU v5", head_size=64)


def test_attention_explains_itself():
    shape = lambda size, dtype: [jax.ShapeDtypeStruct((2, 64, 4, size), dtype)] * 3
    verdicts = lambda *args: {v.name: v for v in explain(ATTENTION, *shape(*args), mask=MaskSpec(), scale=1.0)}
    assert verdicts(64, jnp.bfloat16)["xla"].chosen == ("cpu",)
    assert verdicts(64, jnp.bfloat16)["cudnn"].reason == "runs on NVIDIA GPUs, and here are CPUs only"
    with on(H200):
        assert verdicts(64, jnp.bfloat16)["cudnn"].chosen == ("cuda",)
        assert verdicts(64, jnp.float32)["cudnn"].reason == "takes bfloat16 or float16, got float32"
        assert verdicts(64, jnp.float32)["xla"].chosen == ("cuda",)
    q = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match="is no kernel"):
        attention(q, q, q, mask=MaskSpec(), scale=1.0, implementation="xla", interpret=True)
