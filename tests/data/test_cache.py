"""The tokenised cache: built once, opened afterwards, whole or not there."""

import errno
import json
import os
import signal
import time

import numpy as np
import pytest

from jaxpar.data import cache
from jaxpar.data.config import DataConfig, Jsonl, TextFiles
from jaxpar.data.tokenizers import ByteTokenizer
from jaxpar.errors import UserError
from tests import processes

TEXTS = [f"document {i}: " + "words and more words. " * (i % 7) for i in range(200)]


@pytest.fixture
def corpus(tmp_path):
    """A configuration over 200 weighted documents."""
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": t, "w": i % 3}) + "\n" for i, t in enumerate(TEXTS)))
    return config_of(tmp_path)


def config_of(tmp_path, **changes):
    source = Jsonl(str(tmp_path / "corpus.jsonl"), weight_field="w")
    return DataConfig(**{"source": source, "cache_dir": str(tmp_path / "cache"), "validation_fraction": 0.2, **changes})


def open_(config, tokenizer=None):
    """Both splits, the folder, and what was said."""
    said = []
    streams, name = cache.open_or_build(config, tokenizer or ByteTokenizer(), said.append)
    return streams, cache.cache_dir(config) / name, said


def texts_of(stream):
    """The documents of a stream of bytes, and their weights."""
    found = []
    for a, b, w in zip(stream.starts[:-1], stream.starts[1:], stream.weights, strict=True):
        ids = np.asarray(stream.tokens[a:b])
        assert ids[-1] == 256
        assert (ids[:-1] < 256).all()
        found.append((ids[:-1].astype(np.uint8).tobytes().decode(), float(w)))
    return found


def all_texts(streams):
    return sorted(texts_of(streams["train"]) + texts_of(streams["validation"]))


EXPECTED = sorted((t, float(i % 3)) for i, t in enumerate(TEXTS))


def same(one, other):
    for split in cache.SPLITS:
        for field in ("tokens", "starts", "weights"):
            np.testing.assert_array_equal(getattr(one[split], field), getattr(other[split], field))


def never(*_, **__):
    raise AssertionError("tokenised again")


@pytest.mark.quick
def test_built_once_and_mapped_afterwards(corpus, monkeypatch):
    built, folder, said = open_(corpus)
    assert all_texts(built) == EXPECTED
    assert said == []
    assert len(built["validation"].weights) in range(20, 60)
    # In the order of the source.
    order = [t for t, _ in texts_of(built["train"])]
    assert order == sorted(order, key=TEXTS.index)
    monkeypatch.setattr(cache, "_build", never)
    opened, again, _ = open_(corpus)
    assert again == folder
    same(built, opened)
    for stream in opened.values():
        assert isinstance(stream.tokens, np.memmap)
        assert stream.tokens.dtype == np.uint16
        assert not stream.tokens.flags.writeable
    assert os.listdir(folder.parent) == [folder.name]


def test_an_empty_split_opens(corpus, tmp_path):
    streams, _, _ = open_(config_of(tmp_path, validation_fraction=1e-9))
    assert len(streams["validation"].tokens) == 0
    assert len(streams["train"].weights) == 200


def _truncate(folder):
    with open(folder / "train.tokens", "r+b") as f:
        f.truncate(100)


def _flip(folder):
    file = folder / "train.tokens"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _longer(folder):
    with open(folder / "validation.tokens", "ab") as f:
        f.write(b"xx")


def _table(folder):
    file = folder / "train.starts.npy"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


def _weights(folder):
    file = folder / "train.weights.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 64
    file.write_bytes(data)


def _header(folder):
    file = folder / "train.starts.npy"
    file.write_bytes(b"\0" * file.stat().st_size)


def _meta_garbage(folder):
    (folder / "meta.json").write_text("{")


def _meta_list(folder):
    (folder / "meta.json").write_text("[]")


def _meta_split(folder):
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"]["train"] = None
    (folder / "meta.json").write_text(json.dumps(meta))


def _missing(name):
    def remove(folder):
        (folder / name).unlink()

    remove.__name__ = f"without {name}"
    return remove


DAMAGE = [_truncate, _flip, _longer, _table, _weights, _header, _meta_garbage, _meta_list, _meta_split]
DAMAGE += [_missing(n) for n in ("meta.json", "train.tokens", "train.starts.npy", "validation.weights.npy")]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_damaged_cache_is_built_again(corpus, damage):
    built, folder, _ = open_(corpus)
    tokens = {split: np.array(s.tokens) for split, s in built.items()}
    damage(folder)
    again, _, said = open_(corpus)
    assert len(said) == 1
    assert "is damaged" in said[0]
    assert "built again" in said[0]
    for split in cache.SPLITS:
        np.testing.assert_array_equal(again[split].tokens, tokens[split])
    assert all_texts(again) == EXPECTED
    assert open_(corpus)[2] == []


SLOW = """
import sys, time
from jaxpar.data import cache
from jaxpar.data.config import DataConfig, Jsonl
from jaxpar.data.tokenizers import ByteTokenizer

class Slow(ByteTokenizer):
    def encode_batch(self, texts):
        print("encoding", flush=True)
        time.sleep(0.15)
        return super().encode_batch(texts)

path, folder, moment = sys.argv[1:4]
if ":" in moment:
    # Stand still for ever just before, or after, this function.
    where, name = moment.split(":")
    inner = getattr(cache, name)
    def stop(*a, **k):
        if where == "after":
            inner(*a, **k)
        print("stopped", flush=True)
        time.sleep(600)
    setattr(cache, name, stop)
config = DataConfig(source=Jsonl(path, weight_field="w"), cache_dir=folder, validation_fraction=0.2)
streams, name = cache.open_or_build(config, Slow())
print("opened", name, flush=True)
"""


def start(tmp_path, moment="encode"):
    script = tmp_path / "build.py"
    script.write_text(SLOW)
    return processes.start([script, tmp_path / "corpus.jsonl", tmp_path / "cache", moment])


@pytest.mark.parametrize(
    ("moment", "sign"),
    [
        *[(f"encode {seconds}", "encoding") for seconds in (0.0, 0.2, 0.5)],
        ("before:_tokenise", "stopped"),
        ("after:_tokenise", "stopped"),
        ("before:_write_synced", "stopped"),
        ("after:_write_synced", "stopped"),
        ("before:_remove", "stopped"),
    ],
)
def test_killed_while_it_is_written(corpus, tmp_path, moment, sign):
    process = start(tmp_path, moment)
    process.wait_for(sign, 60)
    if moment.startswith("encode"):
        time.sleep(float(moment.split()[1]))
    process.kill(signal.SIGKILL)
    assert process.popen.returncode == -signal.SIGKILL or "opened" in process.output
    streams, folder, said = open_(corpus)
    assert all_texts(streams) == EXPECTED
    assert said == []
    if moment != "before:_remove":  # there the cache was complete and is only opened
        assert os.listdir(folder.parent) == [folder.name]


def test_what_lives_is_not_swept(corpus, tmp_path):
    process = start(tmp_path, "after:_tokenise")
    process.wait_for("stopped", 60)
    try:
        _, folder, _ = open_(corpus)
        left = [n for n in os.listdir(folder.parent) if n != folder.name]
        assert len(left) == 1
        assert f".{process.popen.pid}." in left[0]
    finally:
        process.kill()
    _remove_whole(folder)
    _, folder, _ = open_(corpus)
    assert os.listdir(folder.parent) == [folder.name]


def _remove_whole(folder):
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def test_what_another_machine_or_nobody_left(corpus, tmp_path, monkeypatch):
    process = start(tmp_path, "after:_tokenise")
    process.wait_for("stopped", 60)
    process.kill()
    (left,) = (tmp_path / "cache").iterdir()
    # Seen from another machine, the process number says nothing until a day has passed.
    monkeypatch.setattr(cache.socket, "gethostname", lambda: "elsewhere")
    (tmp_path / "cache" / ".notes.tmp").mkdir()
    _, folder, _ = open_(corpus)
    assert left.exists()
    _remove_whole(folder)
    os.utime(left, (0, time.time() - 2 * cache.STALE))
    open_(corpus)
    assert not left.exists()
    assert (tmp_path / "cache" / ".notes.tmp").exists()


def test_what_cannot_be_replaced(corpus):
    _, folder, _ = open_(corpus)
    _remove_whole(folder)
    folder.write_text("a file stands here")
    with pytest.raises(UserError, match=r"cannot be replaced.*remove it by hand"):
        open_(corpus)
    assert os.listdir(folder.parent) == [folder.name]


def test_two_at_once(corpus, tmp_path):
    both = [start(tmp_path), start(tmp_path)]
    try:
        for process in both:
            assert process.wait(90) == 0, process.output
    finally:
        for process in both:
            process.kill()
    # Both were at work at the same time, and say the same.
    assert all("encoding" in p.output for p in both)
    assert len({p.output.splitlines()[-1] for p in both}) == 1
    streams, folder, said = open_(corpus)
    assert all_texts(streams) == EXPECTED
    assert said == []
    assert os.listdir(folder.parent) == [folder.name]


@pytest.mark.quick
@pytest.mark.parametrize("place", ["tokens", "table", "meta"])
def test_no_space(corpus, monkeypatch, place, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if place == "tokens":
        monkeypatch.setattr(cache._SplitWriter, "add", full)
    elif place == "table":
        monkeypatch.setattr(np, "save", full)
    else:
        monkeypatch.setattr(cache, "_write_synced", full)
    with pytest.raises(UserError, match=r"no space left.*--data\.cache-dir"):
        open_(corpus)
    assert os.listdir(tmp_path / "cache") == []
    monkeypatch.undo()
    assert all_texts(open_(corpus)[0]) == EXPECTED


def test_a_disk_that_is_really_full(tmp_path):
    # More than a limit on the size of files allows: the write itself fails, not a replacement for it.
    (tmp_path / "corpus.txt").write_text("a line of text\n" * 100_000)
    program = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "from jaxpar.data import cache\n"
        "from jaxpar.data.config import DataConfig, TextFiles\n"
        "from jaxpar.data.tokenizers import ByteTokenizer\n"
        "cache.open_or_build(DataConfig(source=TextFiles(sys.argv[1]), cache_dir=sys.argv[2]), ByteTokenizer())\n"
    )
    process = processes.start(["-c", program, tmp_path / "corpus.txt", tmp_path / "cache"])
    assert process.wait(60) == 1
    assert "UserError: cannot write the tokenised text" in process.output
    assert os.listdir(tmp_path / "cache") == []


def test_a_folder_that_cannot_be_written(tmp_path, corpus):
    (tmp_path / "cache").write_text("a file stands here")
    with pytest.raises(UserError, match=r"cannot write the tokenised text.*--data\.cache-dir"):
        open_(corpus)


class Other(ByteTokenizer):
    identity = "other"


def test_what_decides_the_contents_decides_the_folder(corpus, tmp_path):
    change = lambda **changes: open_(config_of(tmp_path, **changes))[1]
    folders = [
        change(),
        change(validation_fraction=0.3),
        change(source=Jsonl(str(tmp_path / "corpus.jsonl"))),
        change(source=TextFiles(str(tmp_path / "corpus.jsonl"))),
        change(validation_source=Jsonl(str(tmp_path / "corpus.jsonl"))),
        open_(corpus, Other())[1],
    ]
    assert len(set(folders)) == len(folders)
    # What does not: rows are cut from it afterwards.
    for same_ in (change(length=8), change(batch=3), change(seed=5), change(packing="document"), change(prefetch=0)):
        assert same_ == folders[0]


@pytest.mark.quick
def test_changed_text_is_another_cache(corpus, tmp_path):
    _, before, _ = open_(corpus)
    file = tmp_path / "corpus.jsonl"
    file.write_text(file.read_text().replace("document 7", "document _"))
    streams, after, _ = open_(corpus)
    assert before != after
    assert any(t.startswith("document _") for t, _ in all_texts(streams))


def test_moved_text_is_the_same_cache(corpus, tmp_path):
    _, before, _ = open_(corpus)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "corpus.jsonl").rename(tmp_path / "elsewhere" / "corpus.jsonl")
    moved = Jsonl(str(tmp_path / "elsewhere" / "corpus.jsonl"), weight_field="w")
    assert open_(config_of(tmp_path, source=moved))[1] == before


class Writer(ByteTokenizer):
    """Changes the text while it is read."""

    identity = "writer"

    def __init__(self, file):
        self.file = file

    def encode_batch(self, texts):
        new = self.file.with_name("new")
        new.write_text(json.dumps({"text": "other", "w": 1}) + "\n")
        new.replace(self.file)
        return super().encode_batch(texts)


def test_text_that_changes_meanwhile(corpus, tmp_path):
    with pytest.raises(UserError, match="changed while it was being tokenised; run again"):
        open_(corpus, Writer(tmp_path / "corpus.jsonl"))
    assert os.listdir(tmp_path / "cache") == []
    open_(corpus)


@pytest.mark.parametrize("checked", [10**9, 0])
def test_check_sums_of_blocks(corpus, monkeypatch, checked):
    """Of large files, the first and the last block are checked."""
    monkeypatch.setattr(cache, "BLOCK", 1000)
    monkeypatch.setattr(cache, "CHECKED", checked)
    _, folder, _ = open_(corpus)
    file = folder / "train.tokens"
    data = file.read_bytes()
    assert len(data) > 3000
    assert open_(corpus)[2] == []
    for place, told in ((0, True), (1500, checked > 0), (len(data) - 1, True)):
        damaged = bytearray(data)
        damaged[place] ^= 4
        file.write_bytes(damaged)
        assert bool(open_(corpus)[2]) == told
        file.write_bytes(data)


def test_progress_in_lines(capsys):
    now = 0.0
    with cache._Bar("tokenising it", clock=lambda: now) as bar:
        for seconds in range(0, 40, 4):
            now = float(seconds)
            bar.update(seconds / 40)
    assert capsys.readouterr().err.splitlines() == [
        "tokenising it: 30%, 0:28 left",
        "tokenising it: 60%, 0:16 left",
        "tokenising it: 90%, 0:04 left",
    ]


class Wild(ByteTokenizer):
    """Gives an id that its size excludes."""

    identity = "wild"

    def encode(self, text):
        return np.append(super().encode(text), 300).astype(np.int32)


class Narrow(ByteTokenizer):
    """Knows characters only, and begins documents."""

    identity, accepts_bytes, bos, size = "narrow", False, 257, 70_000


@pytest.mark.quick
def test_an_id_beyond_the_vocabulary(corpus, tmp_path):
    with pytest.raises(UserError, match=r"corpus\.jsonl:1: the tokenizer gave id 300, beyond its own 257"):
        open_(corpus, Wild())
    assert os.listdir(tmp_path / "cache") == []


def test_many_ids_and_a_beginning(corpus):
    streams, _, _ = open_(corpus, Narrow())
    train = streams["train"]
    assert train.tokens.dtype == np.uint32
    assert (train.tokens[train.starts[:-1]] == 257).all()
    assert (train.tokens[train.starts[1:] - 1] == 256).all()


@pytest.mark.quick
@pytest.mark.parametrize("content", ["", "\n \n", '{"text": "", "w": 1}\n'])
def test_an_empty_corpus(tmp_path, content):
    (tmp_path / "corpus.jsonl").write_text(content)
    with pytest.raises(UserError, match="there is no text in it"):
        open_(config_of(tmp_path))
    assert os.listdir(tmp_path / "cache") == []


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text \xff\xfe text")
    config = config_of(tmp_path, source=TextFiles(str(tmp_path / "a.txt")))
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8 \(byte 5\).*--tokenizer bytes"):
        open_(config, Narrow())
    streams, _, _ = open_(config)
    tokens = np.concatenate([streams[s].tokens for s in cache.SPLITS])
    assert tokens.tolist() == [*b"text \xff\xfe text", 256]


def test_a_bad_document_in_the_middle_leaves_nothing(corpus, tmp_path):
    with open(tmp_path / "corpus.jsonl", "a") as f:
        f.write("{broken\n")
    with pytest.raises(UserError, match="line 201"):
        open_(corpus)
    assert os.listdir(tmp_path / "cache") == []


def test_a_validation_source_of_its_own(corpus, tmp_path):
    (tmp_path / "held.jsonl").write_text('{"text": "held out"}\n')
    streams, _, _ = open_(config_of(tmp_path, validation_source=Jsonl(str(tmp_path / "held.jsonl"))))
    assert sorted(texts_of(streams["train"])) == EXPECTED
    assert texts_of(streams["validation"]) == [("held out", 1.0)]
