"""`jaxpar tune`: the search with a made-up compiler and clock, and from end to end in Pallas' interpreter."""

import json
from dataclasses import dataclass

import jax
import pytest
from jax.experimental.mosaic.gpu import profiler

from jaxpar.errors import UserError
from jaxpar.pallas_kernels.matmul import mosaic_tpu
from jaxpar.pallas_kernels.tiles import look_up
from jaxpar.pallas_kernels.tuning import cache, search
from jaxpar.pallas_kernels.tuning.timing import Sampler, sets_for
from jaxpar.tuning import Attention, DecodeAttention, QuantMatmul, TuneConfig, measure

V5E = "TPU v5 lite"
LIMIT = "RESOURCE_EXHAUSTED: E1001:\nRan out. Scoped allocation with size 26.45M and limit 16.00M exceeded scoped vmem"


@dataclass(frozen=True)
class Tiles:
    a: int = 2
    b: int = 2
    c: int = 2


def subject(log):
    """Two parts, whose function is its own tiles."""
    make = lambda key: (jax.numpy.zeros(4),)
    first = search.Part("first", tuple({"a": a, "b": b} for a in (1, 2, 3) for b in (2, 4)), lambda tiles: tiles, make)
    second = search.Part("second", ({"c": 1}, {"c": 2}), lambda tiles: tiles, make)
    return search.Subject("op", "kernel", "bfloat16", {"rows": 3}, Tiles(), (first, second))


def compiler(device, tiles, shapes):
    if tiles.a == 3:
        raise ValueError(LIMIT)
    return 100 * tiles.a, None


class Clock:
    """Samples of which the smallest lies, and of which the median is the larger the nearer the tiles are to (2, 2, 2)."""

    def __init__(self, tiles, sets, log):
        self.tiles, self.log, self.count = tiles, log, 0
        assert len(sets) == 8

    def sample(self):
        self.log.append(self.tiles)
        self.count += 1
        mean = 10 - abs(self.tiles.a - 2) - abs(self.tiles.b - 2) - abs(self.tiles.c - 2)
        return 0.0 if self.tiles == Tiles() and self.count == 1 else mean


@pytest.mark.quick
def test_the_fastest_by_median_of_what_compiles():
    log, said = [], []
    what = subject(log)
    candidates = search.tried(what, None, compiler=compiler, say=said.append)
    assert said == candidates
    assert [one.in_table for one in candidates] == [True] + [False] * 5 + [True, False]
    refused = [one for one in candidates if one.refused]
    assert [one.sizes["a"] for one in refused] == [3, 3]
    assert refused[0].refused == "Scoped allocation with size 26.45M and limit 16.00M exceeded"
    search.timed(what, candidates, rounds=3, sampler=lambda tiles, sets: Clock(tiles, sets, log))
    assert search.best(what, candidates) == Tiles(1, 4, 1)
    # One of each a round, and every other round the other way.
    rounds = [log[i : i + 4] for i in range(0, 12, 4)]
    assert rounds[0] == rounds[1][::-1] == rounds[2]
    assert len(set(rounds[0])) == 4
    nothing = [one for one in candidates if one.refused or one.part == "second"]
    with pytest.raises(ValueError, match=r"none of 2 block sizes of its first compiles.*limit 16.00M"):
        search.best(what, nothing)


def test_a_loop_runs_its_function_every_turn():
    """Were it taken out of the loop, or dropped, eight turns would take as long as one."""
    x = jax.random.normal(jax.random.key(0), (384, 384))
    sampler = Sampler(lambda x: (x @ x @ x @ x).sum(), [(x,), (2 * x,)], shortest=1e-4)
    quickest = lambda turns: min(sampler._run(turns) for _ in range(4))
    assert quickest(16) > 4 * quickest(1)
    assert sampler.sample() > 0
    assert sampler.method == "loop"
    assert sampler.output() == pytest.approx(float((x @ x @ x @ x).sum()), rel=1e-3)
    assert sets_for((x,)) == 8
    assert sets_for((jax.ShapeDtypeStruct((2**27,), "float32"),)) == 1


@pytest.mark.parametrize("answer", ["milliseconds", "nothing", "no permission"])
def test_cupti_is_asked_first_on_a_gpu_and_the_loop_where_it_is_refused(answer, monkeypatch):
    def measure(function):
        def run(*args):
            if answer == "no permission":
                raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")
            return function(*args), 6.0 if answer == "milliseconds" else None

        return run

    monkeypatch.setattr(profiler, "measure", measure)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = jax.numpy.ones(8)
    sampler = Sampler(lambda x: x + 1, [(x,), (2 * x,), (3 * x,)], shortest=1e-5)
    assert sampler.output().tolist() == [2] * 8
    if answer == "milliseconds":
        # Three sets in a program.
        assert (sampler.method, sampler.sample()) == ("CUPTI", 2e-3)
    else:
        assert sampler.method == "loop"
        assert 0 < sampler.sample() < 1


OP = QuantMatmul(rows=16, inputs=256, outputs=128, weights="int8_row", activations="int8_row", dtype="float32")


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """The interpreter's times are real, and say nothing of a TPU."""
    path = tmp_path / "folder" / "tiles.json"
    monkeypatch.setenv(cache.VARIABLE, str(path))
    said = []
    run = lambda **more: measure(
        OP.subject(V5E, "mosaic_tpu", interpret=True),
        "v5e",
        jax.devices()[0],
        TuneConfig(op=OP, rounds=3),
        said.append,
        sampler=lambda function, sets: Sampler(function, sets[:1], shortest=1e-4),
        **more,
    )
    return path, said, run


@pytest.mark.quick
def test_kernels_for_gpus_are_tuned_by_their_own_fields():
    """Every candidate names fields of the tiles, and each field is some part's."""
    products = QuantMatmul(rows=64), QuantMatmul(rows=65), QuantMatmul(weights="int8_row", activations="int8_row")
    few = [one.subject("NVIDIA H200", "mosaic_gpu").implementation == "mosaic_gpu_few_rows" for one in products]
    assert few == [True, False, False]
    for op in (Attention(), *products, DecodeAttention()):
        for implementation, kind in (("mosaic_gpu", "NVIDIA H200"), ("mosaic_tpu", V5E)):
            subject = op.subject(kind, implementation)
            named = [set(sizes) for part in subject.parts for sizes in part.candidates]
            assert set().union(*named) == set(vars(subject.table))
            assert all(len(part.candidates) > 1 for part in subject.parts)
    with pytest.raises(ValueError, match=r"decode_attention on Hopper GPUs takes .*, got 80"):
        DecodeAttention(head_size=80).subject("NVIDIA H200", "mosaic_gpu")
    for named in (DecodeAttention(cache="int4_row", kernel="mosaic_gpu_codes"), QuantMatmul(kernel="mosaic_gpu_codes")):
        subject = named.subject("NVIDIA H200", "mosaic_gpu")
        assert subject.implementation == "mosaic_gpu_codes"
        assert set(subject.parts[0].candidates[0]) == set(vars(subject.table))
        with pytest.raises(ValueError, match="mosaic_gpu_codes is a kernel for another platform than mosaic_tpu"):
            named.subject(V5E, "mosaic_tpu")
    with pytest.raises(ValueError, match="takes keys and values in int8 or int4, got bfloat16"):
        DecodeAttention(kernel="mosaic_gpu_codes").subject("NVIDIA H200", "mosaic_gpu")
    with pytest.raises(ValueError, match="takes up to 16 rows of x, got 17"):
        QuantMatmul(rows=17, kernel="mosaic_gpu_codes").subject("NVIDIA H200", "mosaic_gpu")


def test_from_end_to_end(tuned):
    path, said, run = tuned
    assert run() == path
    [entry] = json.loads(path.read_text())["entries"]
    assert entry["dtype"] == "int8_row x int8_row"
    assert entry["sizes"] == {"rows": 16, "columns": 128, "sums": 256}
    assert entry["seconds"]["forward"] > 0
    assert entry["seconds"]["forward"] <= entry["table_seconds"]["forward"]
    assert entry["shape"]["weights"] == "int8_row"
    content = json.loads(path.read_text())
    assert (content["chip"], content["jax"]) == ("v5e", jax.__version__)
    assert content["driver"]
    assert "date" in entry
    kept = look_up(
        mosaic_tpu.TABLE, V5E, op=("quant_matmul", "mosaic_tpu"), dtype=entry["dtype"], rows=9, columns=128, sums=256
    )
    assert vars(kept) == entry["tiles"]
    assert any(line.startswith("best: ") for line in said)
    # Again: the entry is replaced, another shape's stays.
    other = cache.read(path).entries[0]
    other = cache.Entry(other.op, other.implementation, "other", other.sizes, other.tiles)
    cache.write(path, cache.read(path).with_entry(other))
    run(compiler=lambda *_: (0, None))
    assert sorted(row["dtype"] for row in json.loads(path.read_text())["entries"]) == ["int8_row x int8_row", "other"]


@pytest.mark.quick
def test_a_file_that_cannot_be_added_to_is_a_sentence_before_anything_is_compiled(tuned):
    path, _, run = tuned

    def compiled(*_):
        raise AssertionError("compiled")

    path.parent.mkdir()
    for made, words in (
        (cache.Cache("v6e", jax.__version__, ""), "is for a v6e"),
        (cache.Cache("v5e", "0.9.1", ""), "JAX 0.9.1"),
    ):
        cache.write(path, made)
        with pytest.raises(ValueError, match=words):
            run(compiler=compiled)
        assert cache.read(path) == made
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="is a folder"):
        run(compiler=compiled)
    path.rmdir()
    path.parent.rmdir()
    path.parent.write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run(compiler=compiled)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("op", "words"),
    [
        (QuantMatmul(inputs=200), "200 .*128"),
        (QuantMatmul(weights="int8_row"), "takes w in int4, got int8_row"),
        (QuantMatmul(weights="int3"), "int3"),
        (QuantMatmul(outputs=100), "multiples of 128, got 4096 and 100"),
        (Attention(heads=6, key_heads=4), "6 query heads are no multiple of 4"),
        (Attention(head_size=300), "up to 256, got 300"),
        (DecodeAttention(queries=40), "1 to 16 queries a row"),
        (DecodeAttention(cache="int4_g32", head_size=80), "80"),
    ],
)
def test_a_shape_that_the_kernels_do_not_do(op, words):
    with pytest.raises(ValueError, match=words):
        op.subject(V5E, "mosaic_tpu")
