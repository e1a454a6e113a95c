"""Batches are a pure function of the position: whatever the grouping, the devices, the processes, and the moment."""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxpar.data import cache
from jaxpar.data.config import DataConfig, Jsonl
from jaxpar.data.pipeline import Pipeline
from jaxpar.data.sources import base
from jaxpar.errors import UserError
from jaxpar.step import Batch
from tests import processes

FIELDS = tuple(Batch.__dataclass_fields__)
LENGTH = 16
GOLDEN = ([64, 70, 81, 78, 21, 33, 55, 28], [19, 57, 17, 70, 35, 22, 46, 25])


def texts(count):
    return [f"{i}: " + "abc def ghi " * (i % 5) for i in range(count)]


def make(folder, count=60, **changes):
    file = Path(folder) / f"corpus{count}.jsonl"
    if not file.exists():
        file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(count)))
    values = {"source": Jsonl(str(file)), "cache_dir": str(folder), "length": LENGTH, "validation_fraction": 0.2}
    return Pipeline(DataConfig(**{**values, **changes}), say=lambda text: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def pipeline(folder):
    return make(folder)


def one_device():
    return SingleDeviceSharding(jax.devices()[0])


def numpy_of(batch):
    return {name: np.asarray(getattr(batch, name)) for name in FIELDS}


def same(found, expected):
    for name in FIELDS:
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.quick
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_the_iterator_gives_the_batches(folder, prefetch):
    pipeline = make(folder, prefetch=prefetch)
    found = itertools.islice(pipeline.batches(5, 4, one_device()), 6)
    count = 0
    for i, batch in enumerate(found):
        expected = pipeline.batch(5 + 4 * i, 4, one_device())
        same(numpy_of(batch), numpy_of(expected))
        same(numpy_of(batch), pipeline.rows(5 + 4 * i + np.arange(4)))
        count += 1
    assert count == 6


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_any_position_and_any_grouping(pipeline, position, groups):
    fresh = pipeline.rows(position + np.arange(sum(groups)))
    at, parts = position, []
    for rows in groups:
        parts.append(numpy_of(pipeline.batch(at, rows, one_device())))
        at += rows
    same({name: np.concatenate([p[name] for p in parts]) for name in FIELDS}, fresh)
    np.testing.assert_array_equal(fresh["sample_ids"], position + np.arange(sum(groups)))


def test_another_object_gives_the_same(folder, pipeline):
    again = make(folder)
    same(again.rows(np.arange(1000, 1100)), pipeline.rows(np.arange(1000, 1100)))
    assert again.fingerprint == pipeline.fingerprint
    assert json.loads(json.dumps(again.fingerprint)) == again.fingerprint


@pytest.mark.quick
@pytest.mark.parametrize("packing", ["stream", "document"])
def test_each_pass_is_another_order_of_all_examples(folder, packing):
    pipeline = make(folder, packing=packing)
    count = len(pipeline.train)
    passes = pipeline.examples(np.arange(4 * count)).reshape(4, count)
    for one in passes:
        np.testing.assert_array_equal(np.sort(one), np.arange(count))
    for a, b in itertools.combinations([*passes, np.arange(count)], 2):
        assert (a == b).mean() < 0.5


def test_seeds_give_other_orders(folder, pipeline):
    count = len(pipeline.train)
    orders = [make(folder, seed=s).examples(np.arange(count)) for s in (0, 1, 2**31, 2**32 - 1)]
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).mean() < 0.5
    assert len({json.dumps(make(folder, seed=s).fingerprint) for s in (0, 1)}) == 2


def test_neighbouring_seeds_share_no_pass(folder, pipeline):
    count = len(pipeline.train)
    passes = [make(folder, seed=s).examples(np.arange(3 * count)).reshape(3, count) for s in range(3)]
    for a, b in itertools.combinations(np.concatenate(passes), 2):
        assert (a == b).mean() < 0.5


@pytest.mark.quick
def test_the_order_stays_what_it_was(pipeline):
    """Golden numbers: a checkpoint of another version must find its batches again. Where they change (grain's shuffle
    has changed, or ours), old runs cannot go on exactly: pin grain, or put a version of the order into the
    fingerprint so that resuming is refused."""
    count = len(pipeline.train)
    assert count == 82
    assert pipeline.examples(np.arange(8)).tolist() == GOLDEN[0]
    assert pipeline.examples(count + np.arange(8)).tolist() == GOLDEN[1]


@pytest.mark.quick
def test_a_copied_corpus_goes_on(folder, tmp_path, monkeypatch):
    """Large corpora are told apart by paths and dates; what a checkpoint compares is their contents."""
    monkeypatch.setattr(base, "HASHED_BYTES", 0)
    here, there = make(folder), make(tmp_path)
    assert here.fingerprint == there.fingerprint
    assert make(tmp_path, 61).fingerprint != there.fingerprint


def test_a_seed_that_is_too_large(folder):
    with pytest.raises(UserError, match=r"data\.seed"):
        make(folder, seed=2**32)


def test_without_shuffling(folder):
    pipeline = make(folder, shuffle=False)
    count = len(pipeline.train)
    np.testing.assert_array_equal(pipeline.examples(np.arange(2 * count)), np.tile(np.arange(count), 2))
    assert pipeline.fingerprint == make(folder, shuffle=False, seed=7).fingerprint


def test_positions_beyond_32_bits(pipeline):
    rows = pipeline.rows(np.array([2**31 - 1, 2**31, 2**33 + 5]))
    np.testing.assert_array_equal(rows["sample_ids"], [2**31 - 1, 0, 5])
    batch = next(pipeline.batches(2**33, 2, one_device()))
    same(numpy_of(batch), pipeline.rows(2**33 + np.arange(2)))


def sharding_of(devices, shape, names, spec):
    return NamedSharding(jax.sharding.Mesh(np.array(devices).reshape(shape), names), spec)


SHARDINGS = [
    ((8,), ("data",), PartitionSpec("data")),
    ((2, 4), ("data", "fsdp"), PartitionSpec(("data", "fsdp"))),
    ((4, 2), ("data", "tensor"), PartitionSpec("data")),
    ((8,), ("data",), PartitionSpec()),
]


@pytest.mark.quick
@pytest.mark.parametrize("layout", SHARDINGS, ids=str)
def test_shards_equal_rows_and_are_made_once(pipeline, devices, layout, monkeypatch):
    sharding = sharding_of(devices, *layout)
    asked = []
    rows = pipeline.rows
    monkeypatch.setattr(pipeline, "rows", lambda p: asked.append(np.asarray(p)) or rows(p))
    batch = pipeline.batch(13, 16, sharding)
    # Six fields and eight devices, but each row is made once.
    np.testing.assert_array_equal(np.sort(np.concatenate(asked)), 13 + np.arange(16))
    same(numpy_of(batch), rows(13 + np.arange(16)))
    for name in FIELDS:
        array = getattr(batch, name)
        assert array.sharding == sharding
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, rows(13 + np.arange(16))[name][shard.index])
    held = [numpy_of(b) for b in pipeline.validation(2, 8, sharding)]
    for a, b in zip(held, pipeline.validation(2, 8, one_device()), strict=True):
        same(a, numpy_of(b))


PROGRAM = """
import sys
address, count, index = sys.argv[-3], int(sys.argv[-2]), int(sys.argv[-1])
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, count, index)
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
sys.path.insert(0, sys.argv[1])
from test_pipeline import FIELDS, make
pipeline = make(sys.argv[2])
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
asked, rows = [], pipeline.rows
pipeline.rows = lambda p: asked.extend(int(i) for i in p) or rows(p)
batch = pipeline.batch(21, 8, sharding)
mine = 21 + 4 * index + np.arange(4)
assert sorted(asked) == mine.tolist(), asked
for name in FIELDS:
    array = getattr(batch, name)
    assert array.shape[0] == 8
    shards = sorted(array.addressable_shards, key=lambda s: s.index[0].start)
    np.testing.assert_array_equal(np.concatenate([s.data for s in shards]), rows(mine)[name])
print("its rows only", flush=True)
"""


def test_a_process_makes_only_its_rows(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    arguments = [str(Path(__file__).parent), str(tmp_path)]
    both = processes.joined(script, 2, timeout_s=120, devices=2, arguments=arguments, PYTHONPATH=str(processes.ROOT))
    for process in both:
        assert process.popen.returncode == 0, process.output
        assert "its rows only" in process.output


def test_validation_is_fixed_and_padded(folder, pipeline):
    count = len(pipeline.held_out)
    rows = 8
    batches = -(-count // rows)
    assert count % rows, "the test needs a last batch that is not full"
    found = [numpy_of(b) for b in pipeline.validation(batches + 5, rows, one_device())]
    assert len(found) == batches
    for a, b in zip(found, make(folder, seed=3).validation(batches, rows, one_device()), strict=True):
        same(a, numpy_of(b))
    whole = {name: np.concatenate([f[name] for f in found]) for name in FIELDS}
    # Padding rows weigh nothing, and each held-out example stands there once.
    for name in ("weights", "segments"):
        assert (whole[name][count:] == 0).all()
    every = pipeline.held_out.rows(np.arange(count))
    for name in ("tokens", "weights"):
        np.testing.assert_array_equal(np.sort(whole[name][:count], axis=0), np.sort(every[name], axis=0), err_msg=name)
    assert whole["weights"].sum() == every["weights"].sum()
    # The first batches stay the first ones, however many are asked for.
    same(numpy_of(next(pipeline.validation(1, rows, one_device()))), found[0])


def test_bigram_loss_is_on_the_tokens_of_the_validation(pipeline):
    from jaxpar.data import bigram

    model = bigram.fit(pipeline._streams["train"], pipeline.tokenizer.size)
    for batches, rows in ((1, 4), (2, 8), (100, 8)):
        found = [numpy_of(b) for b in pipeline.validation(batches, rows, one_device())]
        whole = {name: np.concatenate([f[name] for f in found]) for name in FIELDS}
        np.testing.assert_allclose(pipeline.bigram_loss(batches, rows), bigram.loss(model, whole), rtol=1e-9)


def documents_of(pipeline, split):
    stream = pipeline._streams[split]
    return {bytes(stream.tokens[a : b - 1].astype(np.uint8)) for a, b in itertools.pairwise(stream.starts)}


@pytest.mark.quick
def test_added_documents_move_no_others(folder):
    before, after = make(folder, 60), make(folder, 90)
    for split in cache.SPLITS:
        assert documents_of(before, split) < documents_of(after, split)
    for one in (before, after):
        assert not documents_of(one, "train") & documents_of(one, "validation")


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=40), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_holds_out_the_same_and_more(text, one, other):
    small, large = sorted((one, other))
    assert cache.is_held_out(text, large) >= cache.is_held_out(text, small)
    assert not cache.is_held_out(text, 0.0)
    assert cache.is_held_out(text, 1.0)


def test_the_fraction_is_what_is_held_out():
    held = sum(cache.is_held_out(b"%d" % i, 0.3) for i in range(20_000))
    assert abs(held / 20_000 - 0.3) < 0.02


def test_what_the_position_counts_is_in_the_fingerprint(folder, pipeline):
    changes = [{"length": 8}, {"packing": "document"}, {"shuffle": False}, {"seed": 1}, {"validation_fraction": 0.3}]
    prints = [make(folder, **c).fingerprint for c in changes] + [pipeline.fingerprint, make(folder, 90).fingerprint]
    assert len({json.dumps(p) for p in prints}) == len(prints)
    for unchanged in ({"batch": 3}, {"prefetch": 0}, {"vocabulary_multiple": 1}):
        assert make(folder, **unchanged).fingerprint == pipeline.fingerprint


@pytest.mark.quick
def test_vocabulary_is_rounded_up(folder):
    assert [make(folder, vocabulary_multiple=m).vocabulary for m in (1, 64, 257)] == [257, 320, 257]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changes", "split"),
    [({"length": 10**6}, "training"), ({"length": 900}, "validation"), ({"validation_fraction": 1e-9}, "validation")],
)
def test_too_little_text_for_a_split(folder, changes, split):
    with pytest.raises(UserError, match=f"the {split} split has .* too few"):
        make(folder, **changes)
