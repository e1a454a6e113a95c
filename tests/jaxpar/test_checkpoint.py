"""Checkpoints: bitwise, on any mesh, never of a broken state, and falling back where one is damaged."""

import json
import os
import shutil
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxpar import manifest
from jaxpar.checkpoint import CheckpointError, Checkpoints, load
from jaxpar.step import TrainState

MODEL = {"width": 16, "layers": 2, "dtype": "float32", "positions": {"kind": "Rope", "base": 1e4}}
CONFIG = {"model": MODEL, "seed": 1}


def make_params(step=0):
    return {
        "embedding": {"tokens": jax.random.normal(jax.random.key(step), (8, 16))},
        "layers": {"up": jax.random.normal(jax.random.key(step + 1), (2, 16, 8)).astype(jnp.bfloat16)},
    }


def make_state(step=0, key=None, slots=None, width=None):
    params = make_params(step) if width is None else {"w": jnp.ones((8, width))}
    return TrainState(
        step=jnp.int32(step),
        params=params,
        opt_state=optax.adamw(1e-3).init(params),
        key=jax.random.key(step) if key is None else key,
        data_position=jnp.int32(8 * step),
        slots={"ema": jax.tree.map(lambda x: x * 2, params)} if slots is None else slots,
    )


def place(state, devices, *spec):
    """The state on a mesh of these devices; matrices split as `spec` says, the rest replicated."""
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    where = lambda x: NamedSharding(mesh, PartitionSpec(*spec) if x.ndim >= 2 else PartitionSpec())
    return jax.tree.map(lambda x: jax.device_put(x, where(x)), state)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def words(state):
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), state)


def same(a, b):
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    chex.assert_trees_all_equal(words(a), words(b))


@pytest.fixture
def said():
    return []


@pytest.fixture
def make(tmp_path, said):
    made = []

    def one(folder="run", **options):
        options = {"config": CONFIG, "say": said.append, **options}
        made.append(Checkpoints(tmp_path / folder, **options))
        return made[-1]

    yield one
    for checkpoints in made:
        checkpoints.close()


def newest(tmp_path):
    return tmp_path / "run" / manifest.name_of(manifest.steps(tmp_path / "run")[-1])


@pytest.mark.quick
@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3), jax.random.key(3, impl="rbg")])
def test_restores_bitwise(make, key):
    state = make_state(5, key)
    checkpoints = make(fingerprint={"files": 3})
    assert checkpoints.save(state, finite=jnp.bool_(True))
    back, meta = make(fingerprint={"files": 3}).restore(abstract(state)) if checkpoints.wait() is None else None
    same(back, state)
    assert meta.step == 5
    assert meta.config == CONFIG
    assert meta.notes == ()
    assert meta.versions["jax"] == jax.__version__


def test_nothing_to_restore(make):
    assert make().restore(abstract(make_state())) is None
    assert make().latest() is None


@pytest.mark.parametrize(("wrote", "reads"), [(8, 2), (2, 8), (4, 1), (1, 4)])
def test_another_number_of_devices(make, devices, wrote, reads):
    state = make_state(5)
    checkpoints = make()
    checkpoints.save(
        place(state, devices[:wrote], "data" if wrote == 2 else None, "data" if wrote != 2 else None), finite=True
    )
    checkpoints.wait()
    target = place(make_state(0), devices[8 - reads :], "data" if reads <= 2 else None)
    back, meta = make().restore(abstract(target))
    same(back, state)
    chex.assert_trees_all_equal(*[jax.tree.map(lambda x: x.sharding, t) for t in (back, target)])
    assert meta.mesh == {"axes": {"data": wrote}, "devices": wrote, "kind": "cpu", "processes": 1}


def test_saved_state_may_be_donated_at_once(make):
    state = jax.tree.map(jnp.copy, make_state(1, key=jax.random.PRNGKey(0)))
    update = jax.jit(lambda s: jax.tree.map(lambda x: x * 3 + 1, s), donate_argnums=0)
    expected = jax.tree.map(np.array, state)
    checkpoints = make()
    checkpoints.save(state, finite=True)
    for _ in range(20):
        state = update(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    back, _ = make().restore(abstract(state))
    chex.assert_trees_all_equal(words(back), expected)


def test_a_broken_state_is_never_saved(make, said):
    checkpoints = make()
    state = make_state(2)
    assert checkpoints.save(make_state(1), finite=True)
    assert not checkpoints.save(state, finite=jnp.bool_(False))
    state.params["embedding"]["tokens"] = state.params["embedding"]["tokens"].at[3, 3].set(jnp.nan)
    assert not checkpoints.save(state, finite=True)
    assert said == ["step 2 was not finite: no checkpoint is made of it"] * 2
    assert checkpoints.latest() == 1


def test_rotation_keeps_the_newest(make, tmp_path):
    checkpoints = make(keep=2)
    for step in range(1, 6):
        checkpoints.save(make_state(step), finite=True)
    checkpoints.wait()
    assert manifest.steps(tmp_path / "run") == [4, 5]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["jaxpar.json", "step_00000004", "step_00000005"]


def test_more_to_keep_than_there_are(make, tmp_path):
    checkpoints = make(keep=6)
    for step in range(1, 5):
        checkpoints.save(make_state(step), finite=True)
    checkpoints.wait()
    assert manifest.steps(tmp_path / "run") == [1, 2, 3, 4]


def test_the_last_good_one_stays_until_a_newer_one_is_whole(make, tmp_path, monkeypatch):
    """A newer one that is damaged as soon as it is written, or whose save fails, does not push out the older one."""
    checkpoints = make(keep=1)
    checkpoints.save(make_state(1), finite=True)
    checkpoints.wait()
    write = manifest.write

    def torn(folder, content):
        write(folder, content)
        next((folder / "ocdbt.process_0" / "d").iterdir()).write_bytes(b"")

    monkeypatch.setattr(manifest, "write", torn)
    checkpoints.save(make_state(2), finite=True)
    checkpoints.wait()
    assert manifest.steps(tmp_path / "run") == [1, 2]
    assert checkpoints.latest() == 1
    monkeypatch.setattr(manifest, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    checkpoints.save(make_state(3), finite=True)
    with pytest.raises(CheckpointError, match=r"step 3 .* no space left on the device; older checkpoints"):
        checkpoints.wait()
    monkeypatch.setattr(manifest, "write", write)
    assert make().restore(abstract(make_state()))[1].step == 1


def test_the_same_step_again_is_saved_once(make, tmp_path):
    checkpoints = make()
    checkpoints.save(make_state(1), finite=True)
    checkpoints.wait()
    when = (tmp_path / "run" / "step_00000001" / "manifest.json").stat().st_mtime_ns
    assert checkpoints.save(make_state(1), finite=True)
    checkpoints.wait()
    assert (tmp_path / "run" / "step_00000001" / "manifest.json").stat().st_mtime_ns == when


def test_a_checkpoint_that_is_not_ours_is_not_overwritten(make):
    checkpoints = make()
    checkpoints.save(make_state(1), finite=True)
    checkpoints.wait()
    with pytest.raises(CheckpointError, match="already holds a checkpoint of step 1 that this run neither made nor"):
        make().save(make_state(1), finite=True)


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_failed_save_is_raised_by_check(make, monkeypatch, tmp_path):
    def fail(folder, content):
        raise RuntimeError("the disk went away")

    checkpoints = make()
    checkpoints.save(make_state(1), finite=True)
    checkpoints.wait()
    monkeypatch.setattr(manifest, "write", fail)
    checkpoints.save(make_state(2), finite=True)

    def loop():
        for _ in range(1000):
            checkpoints.check()
            time.sleep(0.01)

    with pytest.raises(CheckpointError, match=r"step 2 .*RuntimeError: the disk went away; older .*\(steps 1\)"):
        loop()
    checkpoints.check()  # raised once
    assert manifest.unfinished(tmp_path / "run") == []
    monkeypatch.undo()
    assert checkpoints.save(make_state(3), finite=True)  # and the next one works
    assert checkpoints.latest() == 3


def test_no_space_is_told_before_writing(make, monkeypatch, tmp_path):
    checkpoints = make()
    checkpoints.save(make_state(1), finite=True)
    checkpoints.wait()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(CheckpointError, match=r"no space .* step 2 .* 1 MB are free; older checkpoints \(steps 1\)"):
        checkpoints.save(make_state(2), finite=True)
    assert [p.name for p in (tmp_path / "run").iterdir() if "step" in p.name] == ["step_00000001"]
    assert checkpoints.latest() == 1


FULL = """
import resource, signal, sys
import jax, jax.numpy as jnp
from jaxpar.checkpoint import Checkpoints, CheckpointError
from jaxpar.step import TrainState
state = lambda s: TrainState(jnp.int32(s), {"w": jnp.full((300, 1000), s, float)}, (), jax.random.key(0), jnp.int32(0))
c = Checkpoints(sys.argv[1], config={}, keep=1)
c.save(state(1), finite=True); c.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))   # every larger write now fails in the kernel
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
c.save(state(2), finite=True)
try:
    c.wait()
except CheckpointError as error:
    print(error, flush=True)
print(c.latest())
"""


def test_writes_that_fail_in_the_kernel(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path / "run")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    *_, error, latest = run.stdout.strip().splitlines()
    assert "the checkpoint of step 2 could not be written" in error, run.stdout + run.stderr
    assert "older checkpoints (steps 1) are intact" in error
    assert latest == "1"


def damage_truncate(path):
    file = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


def damage_byte(path):
    file = max((p for p in (path / "ocdbt.process_0").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_delete(path):
    next((path / "ocdbt.process_0" / "d").iterdir()).unlink()


def damage_manifest(path):
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])


def damage_meta(path):
    sealed = json.loads((path / "manifest.json").read_text())
    sealed["content"]["config"]["seed"] = 2
    (path / "manifest.json").write_text(json.dumps(sealed))


def damage_no_manifest(path):
    (path / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_truncate, "bytes instead of"),
        (damage_byte, "checksum does not match"),
        (damage_delete, "is missing"),
        (damage_manifest, "its manifest is unreadable"),
        (damage_meta, "does not match its own checksum"),
        (damage_no_manifest, "no manifest"),
    ],
)
def test_damage_is_told_and_the_one_before_is_used(make, tmp_path, said, damage, says):
    checkpoints = make(keep=2)
    for step in (1, 2):
        checkpoints.save(make_state(step), finite=True)
    checkpoints.wait()
    damage(newest(tmp_path))
    again = make(keep=2)
    back, meta = again.restore(abstract(make_state()))
    assert meta.step == 1
    same(back, make_state(1))
    assert len(said) == 1
    assert "ignoring the damaged checkpoint" in said[0]
    assert says in said[0]
    again.save(make_state(2), finite=True)  # the damaged one makes room
    assert again.latest() == 2
    damage(newest(tmp_path))
    shutil.rmtree(tmp_path / "run" / "step_00000001")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* is readable"):
        make().restore(abstract(make_state()))


def test_a_killed_save_and_a_deleted_checkpoint(make, tmp_path, said):
    checkpoints = make()
    for step in (1, 2, 3):
        checkpoints.save(make_state(step), finite=True)
    checkpoints.wait()
    run = tmp_path / "run"
    (run / "step_00000003").rename(run / "step_00000003.orbax-checkpoint-tmp")
    shutil.rmtree(run / "step_00000002")
    again = make()
    assert again.restore(abstract(make_state()))[1].step == 1
    assert len(said) == 1
    assert "save of this checkpoint did not end" in said[0]
    again.save(make_state(2), finite=True)
    again.wait()
    assert sorted(p.name for p in run.iterdir()) == ["jaxpar.json", "step_00000001", "step_00000002"]


# -- what fits --------------------------------------------------------------------------------------------------------


def test_foreign_folders(make, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"photos holds 1 other things \(as 'cat.png'\) and no jaxpar"):
        make("photos")
    with pytest.raises(CheckpointError, match=r"cat\.png is a file; checkpoints need a folder"):
        make("photos/cat.png")
    with pytest.raises(CheckpointError, match=r"there is no checkpoint folder .*nowhere"):
        load(tmp_path / "nowhere", "params", None)
    with pytest.raises(CheckpointError, match="local or mounted folders, not to gs://bucket/run"):
        Checkpoints("gs://bucket/run", config={})
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.png"]


def test_another_model(make):
    checkpoints = make()
    checkpoints.save(make_state(1), finite=True)
    checkpoints.wait()
    other = {**MODEL, "width": 32, "positions": {"kind": "Learned"}, "dtype": "bfloat16"}
    with pytest.raises(CheckpointError) as error:
        make(config={**CONFIG, "model": other}).restore(abstract(make_state(width=4)))
    assert "model.width is 16 there and 32 here" in str(error.value)
    assert 'model.positions.kind is "Rope" there and "Learned" here' in str(error.value)
    assert "dtype" not in str(error.value)
    _, meta = make(config={"model": {**MODEL, "dtype": "bfloat16"}, "seed": 2}).restore(abstract(make_state()))
    assert meta.notes == (
        'changed since the checkpoint: model.dtype is "float32" there and "bfloat16" here, seed is 1 there and 2 here',
    )


def test_other_data(make):
    checkpoints = make(fingerprint={"files": 3, "hash": "a"})
    checkpoints.save(make_state(1), finite=True)
    checkpoints.wait()
    with pytest.raises(CheckpointError, match=r"made on other data.*hash is \"a\" there and \"b\" here"):
        make(fingerprint={"files": 3, "hash": "b"}).restore(abstract(make_state()))
    assert make(fingerprint=None).restore(abstract(make_state()))[1].fingerprint == {"files": 3, "hash": "a"}


def test_other_leaves(make):
    checkpoints = make()
    checkpoints.save(make_state(1), finite=True)
    checkpoints.wait()
    state = make_state(1)
    state.params["embedding"]["tokens"] = jnp.ones((9, 16))
    with pytest.raises(CheckpointError, match=r"tokens is float32\[8, 16\] there and float32\[9, 16\] here"):
        make().restore(abstract(state))
    sgd = state.replace(params=make_params(1), opt_state=optax.sgd(1e-3).init(make_params(1)))
    with pytest.raises(CheckpointError, match=r"opt_state/0/count is int32.* there and not in this run"):
        make().restore(abstract(sgd))


def test_slots_come_and_go(make, said):
    """Written with {ema, spikes}, read with {ema, clip}, written, read with {spikes}: nothing is lost."""
    spikes = {"window": jnp.arange(4.0), "key": jax.random.key(7)}
    first = make_state(1, slots={"ema": make_params(9), "spikes": spikes})
    checkpoints = make()
    checkpoints.save(first, finite=True)
    checkpoints.wait()

    middle = make()
    target = make_state(0, slots={"ema": make_params(0), "clip": {"norm": jnp.zeros(())}})
    with pytest.raises(CheckpointError, match=r"slot 'clip' is not in the checkpoint.* nothing was given to"):
        middle.restore(abstract(target))
    fresh = lambda s: s.replace(slots={"ema": None, "clip": {"norm": s.params["embedding"]["tokens"][0, 0]}})
    back, meta = middle.restore(abstract(target), fresh=fresh)
    same(back.slots["ema"], make_params(9))
    assert back.slots["clip"]["norm"] == first.params["embedding"]["tokens"][0, 0]  # from the *restored* parameters
    assert (meta.initialised, meta.kept) == (("clip",), ("spikes",))
    assert any("'spikes' of the checkpoint is not used by this run and is kept" in note for note in meta.notes)
    middle.save(back.replace(step=jnp.int32(2)), finite=True)
    middle.wait()

    back, meta = make().restore(abstract(make_state(0, slots={"spikes": spikes})))
    same(back.slots["spikes"], spikes)
    assert meta.kept == ("clip", "ema")
    assert any("'spikes' was last updated at step 1" in note for note in meta.notes)


def test_the_order_of_slots_does_not_change_the_file(make, tmp_path):
    a, b = make("a"), make("b")
    a.save(make_state(1, slots={"x": jnp.ones(2), "y": jnp.ones(3)}), finite=True)
    b.save(make_state(1, slots={"y": jnp.ones(3), "x": jnp.ones(2)}), finite=True)
    a.wait(), b.wait()
    leaves = [list(manifest.read(tmp_path / f / "step_00000001")["leaves"]) for f in "ab"]
    assert leaves[0] == leaves[1]


def test_load_a_part(make, tmp_path):
    state = make_state(3)
    checkpoints = make()
    checkpoints.save(state, finite=True)
    checkpoints.wait()
    params, meta = load(tmp_path / "run", "params", lambda meta: abstract(state.params))
    same(params, state.params)
    assert meta.config == CONFIG
    ema, _ = load(tmp_path / "run", "slots/ema", lambda meta: abstract(state.params))
    same(ema, state.slots["ema"])
    with pytest.raises(CheckpointError, match=r"holds no 'slots/average'; it has .*slots/ema"):
        load(tmp_path / "run", "slots/average", lambda meta: None)


def test_a_whole_checkpoint_that_cannot_be_read_is_not_passed_over(make, monkeypatch):
    """Falling back is for damage. Anything else (no memory, a bug) must not cost the newest checkpoint silently."""
    checkpoints = make()
    for step in (1, 2):
        checkpoints.save(make_state(step), finite=True)
    checkpoints.wait()

    def fail(*_):
        raise MemoryError("out of memory")

    monkeypatch.setattr("jaxpar.checkpoint_read.read_arrays", fail)
    with pytest.raises(CheckpointError, match="step_00000002 is whole but could not be read: out of memory"):
        make().restore(abstract(make_state()))
