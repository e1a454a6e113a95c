"""Sources of text: what they give, in which order, and one sentence for everything that is wrong."""

import gzip
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.data.config import DataConfig, source_from
from jaxpar.data.sources import text as text_module
from jaxpar.data.sources.base import Source, manifest
from jaxpar.data.sources.jsonl import Jsonl
from jaxpar.data.sources.stdlib import Stdlib
from jaxpar.data.sources.tables import HuggingFace, Parquet
from jaxpar.data.sources.text import TextFiles
from jaxpar.errors import UserError

quick = pytest.mark.quick


def texts(source):
    return [d.text.decode() for d in source.documents()]


def check_progress(source):
    done = [d.done for d in source.documents()]
    assert done == sorted(done)
    assert all(0 <= d <= 1.0 for d in done)
    assert done[-1] > 0.99


def sentence(error):
    """What the user reads: one line, without a Python name in it."""
    text = str(error.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


# The standard library


@quick
def test_stdlib():
    source = Stdlib(megabytes=0.5)
    found = list(source.documents())
    names = [d.name for d in found]
    assert names == sorted(names)
    assert len(set(names)) == len(names) > 5
    assert 0.5e6 <= sum(len(d.text) for d in found) < 2e6
    assert all(name.endswith(".py") for name in names)
    assert isinstance(source, Source)
    check_progress(source)
    assert found == list(source.documents())
    every = {f.name for f in Stdlib().files()}
    assert {"json", "argparse.py"} & every
    assert not any("site-packages" in f.parts or "test" in f.parts for f in Stdlib().files())
    assert set(source.files()) < set(Stdlib().files())


def test_stdlib_parts_are_nested():
    small, large = (set(Stdlib(megabytes=m).files()) for m in (0.3, 2))
    assert small < large


@pytest.mark.parametrize("megabytes", [0, -1, float("nan")])
def test_stdlib_of_no_size(megabytes):
    with pytest.raises(UserError, match=r"data\.source\.megabytes must be positive"):
        Stdlib(megabytes=megabytes)


def test_a_python_without_its_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(Stdlib, "_root", lambda self: tmp_path)
    with pytest.raises(UserError, match=r"no standard library sources.*--source PATH"):
        Stdlib().files()


# Text


@quick
def test_a_folder_of_text(tmp_path):
    for name, content in (("b.txt", "two"), ("a/z.txt", "one"), ("c.md", "three"), (".hidden/x.txt", "no")):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    (tmp_path / "empty.txt").touch()
    assert [(d.name, d.text) for d in TextFiles(str(tmp_path)).documents()] == [
        ("a/z.txt", b"one"),
        ("b.txt", b"two"),
        ("c.md", b"three"),
    ]
    assert texts(TextFiles(str(tmp_path), pattern="**/*.md")) == ["three"]
    check_progress(TextFiles(str(tmp_path)))


@quick
def test_a_single_file_is_cut_at_lines(tmp_path):
    content = "".join(f"line {i} of a long text\n" for i in range(20_000))
    (tmp_path / "a.txt").write_text(content)
    source = TextFiles(str(tmp_path / "a.txt"))
    found = texts(source)
    assert "".join(found) == content
    assert 150 < len(found) <= 256
    assert all(piece.endswith("\n") for piece in found)
    check_progress(source)


@settings(deadline=None, max_examples=100)
@given(st.text("aé한\n ", max_size=200), st.integers(1, 20))
def test_pieces_are_the_file_and_whole_characters(tmp_path_factory, content, limit):
    file = tmp_path_factory.mktemp("cut") / "a.txt"
    file.write_bytes(content.encode())
    pieces = [d.text for d in TextFiles(str(file), document_bytes=limit).documents()]
    assert b"".join(pieces) == content.encode()
    for piece in pieces:
        assert piece
        piece.decode()


@settings(deadline=None, max_examples=150)
@given(st.lists(st.text("ab<|>", max_size=12), max_size=8), st.integers(1, 9))
def test_separators(tmp_path_factory, parts, block):
    file = tmp_path_factory.mktemp("split") / "a.txt"
    content = "<|>".join(parts)
    file.write_text(content)
    before, text_module.BLOCK = text_module.BLOCK, block  # so that separators lie across the blocks that are read
    try:
        assert texts(TextFiles(str(file), separator="<|>")) == [p for p in content.split("<|>") if p]
    finally:
        text_module.BLOCK = before


def test_bytes_pass_unchanged(tmp_path):
    data = bytes(range(256)) * 20
    (tmp_path / "a.bin").write_bytes(data)
    assert b"".join(d.text for d in TextFiles(str(tmp_path / "a.bin")).documents()) == data


@quick
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: TextFiles(f"{p}/none.txt"), "the text source not found: .*none.txt"),
        (lambda p: TextFiles(""), "the text source needs a path"),
        (lambda p: TextFiles(f"{p}/empty"), "the folder .*empty holds no file matching"),
        (lambda p: TextFiles(str(p), pattern="*.zzz"), r"holds no file matching '\*\.zzz'"),
        (lambda p: TextFiles(str(p), pattern="/etc/*"), "is no relative glob"),
        (lambda p: TextFiles(str(p), pattern=""), "is no relative glob"),
        (lambda p: TextFiles(str(p), separator=""), r"data\.source\.separator is empty"),
        (lambda p: TextFiles(str(p), document_bytes=0), r"data\.source\.document_bytes must be at least 1, got 0"),
        (lambda p: Jsonl(f"{p}/none.jsonl"), "the JSONL source not found"),
        (lambda p: Jsonl(f"{p}/empty"), "holds no file ending in .jsonl or"),
        (lambda p: Parquet(f"{p}/none.parquet"), "the Parquet source not found"),
        (lambda p: Parquet(f"{p}/empty"), "holds no file ending in .parquet"),
        (lambda p: HuggingFace(f"{p}/none"), "the data set not found"),
        (lambda p: HuggingFace(f"{p}/empty"), "is not a data set saved with datasets' save_to_disk"),
        (lambda p: source_from(f"{p}/none"), r"the data source \(stdlib, a file or a folder\) not found"),
        (lambda p: source_from(""), "needs a path"),
    ],
)
def test_missing_and_empty(tmp_path, make, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=message) as error:
        make(tmp_path).files()
    sentence(error)


@pytest.mark.parametrize("kind", [TextFiles, Jsonl])
def test_a_file_that_cannot_be_opened(tmp_path, kind, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n')
    file.chmod(0)
    if os.access(file, os.R_OK):  # the administrator may read everything
        import builtins

        def refuse(path, *rest, real=open, **options):
            if str(path) == str(file):
                raise PermissionError(13, "Permission denied")
            return real(path, *rest, **options)

        monkeypatch.setattr(builtins, "open", refuse)
    for call in (lambda s: list(s.documents()), manifest):
        with pytest.raises(UserError, match=r"cannot read .*a\.jsonl: Permission denied"):
            call(kind(str(file)))


# JSON lines


def write(file, data):
    with gzip.open(file, "wb") if file.suffix == ".gz" else open(file, "wb") as f:
        f.write(data)
    return str(file)


def lines(*records):
    return "".join(json.dumps(r) + "\n" for r in records).encode()


@quick
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson", "a.json.gz"])
def test_json_lines(tmp_path, name):
    data = lines({"text": "één"}, {"text": ""}, {"text": None}) + b"\n  \n" + lines({"text": "two", "n": 1})
    source = Jsonl(write(tmp_path / name, data))
    assert texts(source) == ["één", "two"]
    assert [d.name.rpartition(":")[2] for d in source.documents()] == ["1", "6"]
    assert {d.weight for d in source.documents()} == {1.0}


@quick
def test_json_fields_and_weights(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"body": "x", "w": 0}, {"body": "y", "w": 2.5}))
    found = list(Jsonl(path, field="body", weight_field="w").documents())
    assert [(d.text, d.weight) for d in found] == [(b"x", 0.0), (b"y", 2.5)]


def test_json_folder_bom_and_surrogates(tmp_path):
    write(tmp_path / "b.jsonl", lines({"text": "second"}))
    write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + lines({"text": "first"}) + rb'{"text": "\ud800x"}')
    (tmp_path / "notes.txt").write_text("not this")
    source = Jsonl(str(tmp_path))
    assert texts(source) == ["first", "?x", "second"]
    check_progress(source)


@quick
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", "line 2 of .* is not JSON: .*column 2"),
        (b"[1, 2]", "line 2 of .* is a list, but each line must be an object"),
        (b'"text"', "line 2 of .* is a string"),
        (b'{"text": "\xff"}', r"line 2 of .* is not UTF-8 \(byte 10"),
        (
            b'{"Text": "a", "w": 1}',
            r"line 2 of .* has no field 'text'; its fields are: 'Text', 'w' .*data\.source\.field",
        ),
        (b"{}", "has no field 'text'; its fields are: none"),
        (b'{"text": 3, "w": 1}', "line 2 of .*: the field 'text' is a number, but must be a string"),
        (b'{"text": {"a": 1}, "w": 1}', "the field 'text' is an object, but must be a string"),
        (b'{"text": "a"}', r"line 2 of .* has no field 'w'.*data\.source\.weight_field"),
        (b'{"text": "a", "w": NaN}', "line 2 of .*: the weight 'w' is nan; it must be a number from 0 on"),
        (b'{"text": "a", "w": Infinity}', "the weight 'w' is inf"),
        (b'{"text": "a", "w": -1}', "the weight 'w' is -1"),
        (b'{"text": "a", "w": "1"}', "the weight 'w' is a string, but must be a number"),
        (b'{"text": "a", "w": null}', "the weight 'w' is null"),
        (b'{"text": "a", "w": true}', "the weight 'w' is a boolean"),
        (b'{"text": "a", "w": 1' + b"0" * 400 + b"}", "the weight 'w' is .* from 0 on"),
        (b'{"text": ' + b"[" * 100_000, "line 2 of .* is not JSON"),
        (b"1" * 5000, "line 2 of .* is not JSON"),
    ],
    ids=range(18),
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_bad_json(tmp_path, name, line, message):
    path = write(tmp_path / name, lines({"text": "fine", "w": 1}) + line + b"\n")
    with pytest.raises(UserError, match=message) as error:
        list(Jsonl(path, weight_field="w").documents())
    assert len(sentence(error)) < 1000


@quick
@pytest.mark.parametrize("how", ["cut", "no gzip", "flipped"])
def test_torn_gzip(tmp_path, how):
    file = tmp_path / "a.jsonl.gz"
    write(file, lines(*({"text": os.urandom(20).hex()} for _ in range(500))))
    data = bytearray(file.read_bytes())
    if how == "flipped":
        data[-6] ^= 1
    file.write_bytes({"cut": data[: len(data) // 2], "no gzip": b"{}" + data, "flipped": data}[how])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz is not whole gzip data") as error:
        list(Jsonl(str(file)).documents())
    sentence(error)


# Tables


def test_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [f"text {i} é" for i in range(600)]
    rows[3], rows[4] = "", None
    for name, part in (("b", rows[400:]), ("a", rows[:400])):
        parquet.write_table(pyarrow.table({"id": range(len(part)), "text": part}), tmp_path / f"{name}.parquet")
    source = Parquet(str(tmp_path))
    assert texts(source) == [r for r in rows if r]
    check_progress(source)
    with pytest.raises(UserError, match=r"has no column 'body'; its columns are: 'id', 'text' .*data\.source\.column"):
        texts(Parquet(str(tmp_path), column="body"))
    with pytest.raises(
        UserError, match=r"row 0 of .*a.parquet: the column 'id' holds values of type int, but must hold text"
    ):
        texts(Parquet(str(tmp_path), column="id"))
    parquet.write_table(pyarrow.table({"raw": [b"\xff\x00", b"b"]}), tmp_path / "c.parquet")
    assert [d.text for d in Parquet(str(tmp_path / "c.parquet"), "raw").documents()] == [b"\xff\x00", b"b"]


@pytest.mark.parametrize("how", ["cut", "text", "empty"])
def test_torn_parquet(tmp_path, how):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"] * 100}), file)
    data = file.read_bytes()
    file.write_bytes({"cut": data[:-20], "text": b"hello", "empty": b""}[how])
    with pytest.raises(UserError, match=r"a\.parquet is not a whole Parquet file") as error:
        texts(Parquet(str(file)))
    sentence(error)


def test_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    one = datasets.Dataset.from_dict({"text": ["a", "", "b é"], "n": [1, 2, 3]})
    one.save_to_disk(tmp_path / "one")
    assert texts(HuggingFace(str(tmp_path / "one"))) == ["a", "b é"]
    check_progress(HuggingFace(str(tmp_path / "one")))
    assert source_from(str(tmp_path / "one")) == HuggingFace(str(tmp_path / "one"))
    with pytest.raises(UserError, match="has no column 'body'; its columns are: 'text', 'n'"):
        texts(HuggingFace(str(tmp_path / "one"), column="body"))
    with pytest.raises(UserError, match=r"row 0 of .*: the column 'n' holds values of type int"):
        texts(HuggingFace(str(tmp_path / "one"), column="n"))

    both = datasets.DatasetDict({"train": one, "test": datasets.Dataset.from_dict({"text": ["c"]})})
    both.save_to_disk(tmp_path / "both")
    path = str(tmp_path / "both")
    assert texts(HuggingFace(path, split="test")) == ["c"]
    assert texts(HuggingFace(path, split="train")) == ["a", "b é"]
    with pytest.raises(UserError, match=r"holds several splits, 'train', 'test'; choose one with data\.source\.split"):
        texts(HuggingFace(path))
    with pytest.raises(UserError, match="has no split 'dev'; its splits are: 'train', 'test'"):
        texts(HuggingFace(path, split="dev"))
    # Another split is another source.
    assert manifest(HuggingFace(path, split="test")) != manifest(HuggingFace(path, split="train"))

    for file in (tmp_path / "one").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match="cannot be read as a data set") as error:
        texts(HuggingFace(str(tmp_path / "one")))
    sentence(error)


@quick
@pytest.mark.parametrize(("source", "package"), [(Parquet, "pyarrow"), (HuggingFace, "datasets")])
def test_a_package_that_is_missing(tmp_path, monkeypatch, source, package):
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UserError, match=rf"needs the package {package}: pip install 'jaxpar\[datasets\]'"):
        texts(source(str(tmp_path)))


# A source by its name


@quick
@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a.jsonl"], Jsonl),
        (["a.jsonl.gz", "b.json"], Jsonl),
        (["a.parquet", "b.parquet"], Parquet),
        (["a.txt"], TextFiles),
        (["a.txt", "b.jsonl"], TextFiles),
        (["a.py", ".hidden.jsonl"], TextFiles),
        (["state.json", "data.arrow"], HuggingFace),
    ],
)
def test_source_by_name(tmp_path, names, kind):
    for name in names:
        (tmp_path / name).write_text("x")
    assert source_from(str(tmp_path)) == kind(str(tmp_path))
    if kind is not HuggingFace and len(names) == 1:
        assert source_from(str(tmp_path / names[0])) == kind(str(tmp_path / names[0]))


@quick
def test_stdlib_is_the_default_and_has_a_name():
    assert source_from("stdlib") == Stdlib() == DataConfig().source


@quick
def test_manifest_is_the_contents(tmp_path, monkeypatch):
    from jaxpar.data.sources import base

    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    source = TextFiles(str(tmp_path))
    first = manifest(source)
    assert json.loads(json.dumps(first)) == first == manifest(source)
    os.utime(tmp_path / "a.txt", (1, 1))
    assert manifest(source) == first
    (tmp_path / "a.txt").write_text("owe")
    assert manifest(source) != first
    assert manifest(TextFiles(str(tmp_path), separator="x")) != manifest(source)
    # What is too large to be read is told by sizes and times.
    monkeypatch.setattr(base, "HASHED_BYTES", 2)
    large = manifest(source)
    os.utime(tmp_path / "a.txt", (5, 5))
    assert manifest(source) != large
