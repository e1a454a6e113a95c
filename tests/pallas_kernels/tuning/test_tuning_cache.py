"""The tuning cache: entries come before the table, for what they were measured for and nothing else; a file that cannot be
used is a sentence, before anything is traced."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxpar import compile_cache
from jaxpar.pallas_kernels.attention import MaskSpec, attention, mosaic_tpu
from jaxpar.pallas_kernels.formats.quantised import quantise
from jaxpar.pallas_kernels.matmul import quant_matmul
from jaxpar.pallas_kernels.tiles import look_up
from jaxpar.pallas_kernels.tuning import cache

V5E = "TPU v5 lite"
OP = "attention", "mosaic_tpu"
SIZES = dict(head_size=128, queries=3000, keys=4096)
BEST = mosaic_tpu.AttentionTiles(128, 256, 384, 512)
ENTRY = cache.Entry(*OP, "bfloat16", cache.shape_class(SIZES), tuple(vars(BEST).items()), (("seconds", 1.5),))
KNOWN = cache.Cache("v5e", jax.__version__, "libtpu 0", (ENTRY,))


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The named file; nothing is in it yet."""
    monkeypatch.setenv("JAXPAR_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "tiles.json"))
    return tmp_path / "tiles.json"


def on(kind: str):
    """What is traced in here is for this kind of TPU."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def found(kind=V5E, dtype="bfloat16", **sizes):
    return look_up(mosaic_tpu.TABLE, kind, op=OP, dtype=dtype, **SIZES | sizes)


@pytest.mark.quick
def test_an_entry_is_taken_for_its_class_of_shapes_and_nothing_else(file):
    cache.write(file, KNOWN)
    table = look_up(mosaic_tpu.TABLE, V5E, **SIZES)
    assert found() == found(queries=2049) == found(queries=4096, keys=2050) == BEST != table
    assert found(dtype=jnp.bfloat16) == BEST
    assert found(queries=2048) == found(keys=4097) == found(dtype=jnp.float32) == table
    assert look_up(mosaic_tpu.TABLE, V5E, op=("attention", "other"), dtype="bfloat16", **SIZES) == table


@pytest.mark.quick
def test_a_file_is_read_as_it_was_written_and_anew_when_it_changes(file):
    cache.write(file, KNOWN)
    read = cache.read(file)
    assert dict(read.entries[0].tiles) == vars(BEST)
    assert (read.entries[0].key, read.entries[0].record) == (ENTRY.key, ENTRY.record)
    assert found() == BEST
    wider = dataclasses.replace(ENTRY, tiles=tuple((vars(BEST) | {"keys": 1024}).items()))
    cache.write(file, KNOWN.with_entry(wider))
    os.utime(file, ns=(0, 1))
    assert found().keys == 1024
    assert len(cache.read(file).entries) == 1


def test_the_default_file_lies_beside_the_compiled_programs(tmp_path, monkeypatch):
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    for name, folder in (("JAXPAR_CACHE", tmp_path / "own"), ("XDG_CACHE_HOME", tmp_path / "xdg")):
        monkeypatch.delenv("JAXPAR_CACHE", raising=False)
        monkeypatch.setenv(name, str(folder))
        assert cache.default("v5e") == compile_cache.cache_root() / "tiles" / "v5e.json"
    assert found() == look_up(mosaic_tpu.TABLE, V5E, **SIZES)
    cache.write(cache.default("v5e"), KNOWN)
    assert found() == BEST
    assert found(kind="TPU v6 lite") == found(kind=None) != BEST


def changed(**values):
    return lambda: json.dumps(json.loads(text()) | values)


def text() -> str:
    row = {"op": OP[0], "implementation": OP[1], "dtype": "bfloat16", "sizes": dict(ENTRY.sizes), "tiles": vars(BEST)}
    return json.dumps({"chip": "v5e", "jax": jax.__version__, "driver": "", "entries": [row]})


def tiles(**values):
    row = json.loads(text())["entries"][0]
    return changed(entries=[row | {"tiles": values}])


BAD = {
    "torn": (lambda: text()[:-20], ("is no whole tuning cache", "jaxpar tune")),
    "empty": (lambda: "", ("is no whole tuning cache",)),
    "another file": (lambda: "[1, 2]", ("is no whole tuning cache",)),
    "an entry without tiles": (changed(entries=[{"op": "attention"}]), ("is no whole tuning cache",)),
    "another chip": (changed(chip="v6e"), ("is for a v6e", "is for a v5e")),
    "another JAX": (changed(jax="0.9.1"), ("JAX 0.9.1", f"JAX {jax.__version__}")),
    "tiles of another kernel": (tiles(rows=64), ("{'rows': 64}", "queries, keys, queries_back, keys_back")),
    "tiles of nothing": (tiles(**vars(BEST) | {"keys": 0}), ("'keys': 0", "at least 1")),
    "tiles in halves": (tiles(**vars(BEST) | {"keys": 0.5}), ("0.5 is no whole number",)),
    "no file": (None, ("there is no such file", cache.VARIABLE)),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_used_is_one_sentence_before_anything_is_traced(name, file):
    make, words = BAD[name]
    if make is not None:
        file.write_text(make())
    x = jax.ShapeDtypeStruct((1, 4096, 1, 128), jnp.bfloat16)
    call = lambda q: attention(q, q, q, mask=MaskSpec(), scale=1.0, implementation="mosaic_tpu")
    with on(V5E), pytest.raises(ValueError, match=r"cache|JAXPAR_TUNE_CACHE") as error:
        jax.eval_shape(call, x)
    said = str(error.value)
    assert all(word in said for word in (*words, str(file))), said
    assert "\n" not in said


def test_a_named_file_is_for_a_chip_that_is_known(file):
    cache.write(file, KNOWN)
    with pytest.raises(ValueError, match="names no chip that is known"):
        found(kind=None)


def test_a_write_that_is_cut_off_leaves_what_was_there(file, monkeypatch):
    cache.write(file, KNOWN)
    before = file.read_text()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.write(file, cache.Cache("v5e", "0", ""))
    assert file.read_text() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_kernels_ask_for_their_entries(file):
    """Attention's plan has the tiles, fitted to the shape; a product's grid follows from them."""
    product = dict(rows=16, columns=512, sums=256)
    entry = cache.Entry(
        "quant_matmul",
        "mosaic_tpu",
        "bfloat16 x int4_g128",
        cache.shape_class(product),
        (("rows", 16), ("columns", 128), ("sums", 256)),
    )
    cache.write(file, KNOWN.with_entry(entry))
    q = jax.ShapeDtypeStruct((1, 2500, 1, 128), jnp.bfloat16)
    w = jax.eval_shape(lambda w: quantise(w, "int4_g128", 0), jax.ShapeDtypeStruct((256, 512), jnp.float32))
    multiply = lambda x, w: quant_matmul(x, w, implementation="mosaic_tpu")
    with on(V5E):
        assert mosaic_tpu.plan(q, q, q, mask=MaskSpec(), scale=1.0).tiles == BEST.fit(2500, 2500)
        grid = lambda rows: str(jax.make_jaxpr(multiply)(jax.ShapeDtypeStruct((rows, 256), jnp.bfloat16), w))
        assert "grid=(1, 4, 1)" in grid(16)
        assert "grid=(1, 1, 1)" in grid(17)
