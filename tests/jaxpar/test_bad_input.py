"""What people type wrong: each gets one sentence and exit code 2, and nothing is written or lost."""

import errno
import hashlib
import inspect
import json
import random
import shutil
import struct
from pathlib import Path

import pytest

from jaxpar.cli import main
from tests.jaxpar.bad_input_cases import CASES, TRAIN
from tests.processes import start

ROW = 'def f(x):\n    return x + 1  # {"text"}\n'


def words(line: str, world: Path) -> list[str]:
    train = TRAIN
    weighted = train.replace("{w}/text.txt", "jsonl") + " --source.weight-field weight"
    line = line.replace("{train}", train).replace("{weighted}", weighted)
    return line.format(w=world).split()


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and folder with a digest of what is in it."""
    return {
        str(p.relative_to(folder)): hashlib.md5(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in folder.rglob("*")
    }


def text(seed: int, lines: int = 800) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(inspect.getsource(random).splitlines()) + "\n" for _ in range(lines))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder of good and bad things."""
    w = tmp_path_factory.mktemp("bad") / "world"
    (w / "empty").mkdir(parents=True)
    (w / "text.txt").write_text(text(0))
    (w / "other.txt").write_text(text(1))
    (w / "empty.txt").write_text("")
    # Each device waits for what the other would do next.
    (w / "cycle.csv").write_text("0B0,0F0\n1F0,1B0\n")
    (w / "short.txt").write_text("a word\n")
    (w / "broken_tokenizer").mkdir()
    (w / "broken_tokenizer" / "tokenizer.json").write_text('{"version": "1.0", "model": {')
    good = json.dumps({"text": ROW, "weight": 1.0})
    for name, line in {
        "torn": '{"text": "def',
        "nan": json.dumps({"text": ROW, "weight": float("nan")}),
        "negative": json.dumps({"text": ROW, "weight": -1}),
        "word": json.dumps({"text": ROW, "weight": "heavy"}),
    }.items():
        (w / f"{name}.jsonl").write_text(f"{good}\n{line}\n" + f"{good}\n" * 50)
    (w / "other.jsonl").write_text('{"body": "def"}\n')
    (w / "fake.parquet").write_bytes(b"PAR0 is not it")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["def"]}), w / "table.parquet")
    (w / "foreign" / "checkpoints").mkdir(parents=True)
    (w / "foreign" / "checkpoints" / "notes.txt").write_text("mine")

    assert main([*words(TRAIN, w), "--folder", str(w / "run")]) == 0
    learned = "--positions no-positions --norm layer-norm --norm-placement post"
    assert main([*words(f"{TRAIN} {learned}", w), "--folder", str(w / "learned")]) == 0
    for name in ("damaged", "newer"):
        shutil.copytree(w / "run", w / name)
        for manifest in (w / name / "checkpoints").glob("*/manifest.json"):
            if name == "damaged":
                manifest.write_text(manifest.read_text()[:-40])
            else:
                newer(manifest)

    (w / "cut.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 5, 5))
    assert main(["convert", "--source", str(w / "run"), "--target", str(w / "hf")]) == 0
    for name in ("hf_unknown", "hf_empty", "hf_torn", "hf_missing"):
        shutil.copytree(w / "hf", w / name)
    config = json.loads((w / "hf" / "config.json").read_text())
    (w / "hf_unknown" / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    (w / "hf_torn" / "config.json").write_text(json.dumps(config)[:50])
    for file in (w / "hf_empty").glob("*.safetensors*"):
        file.unlink()
    from safetensors.numpy import load_file, save_file

    file = w / "hf_missing" / "model.safetensors"
    save_file({name: x for name, x in load_file(file).items() if name != "model.norm.weight"}, file)
    return w


def newer(manifest: Path) -> None:
    """Make a checkpoint one of a later format."""
    import zlib

    content = {**json.loads(manifest.read_text())["content"], "version": 99}
    seal = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    manifest.write_text(json.dumps({"crc32": seal, "content": content}))


def one_sentence(err: str, expected: tuple[str, ...]) -> None:
    assert err.startswith("jaxpar: "), err
    assert err.count("\n") == 1, err
    assert err.endswith("\n"), err
    assert "Traceback" not in err
    assert 20 < len(err) < 600, err
    for word in expected:
        assert word in err, (word, err)


def test_there_are_at_least_forty_cases():
    assert len(CASES) >= 40
    assert len({case.line for case in CASES}) == len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_input_is_one_sentence(case, world, capsys):
    before = snapshot(world)
    assert main(words(case.line, world)) == 2
    one_sentence(capsys.readouterr().err, case.words)
    assert snapshot(world) == before


@pytest.mark.parametrize("name", ["unknown preset", "coordinator alone", "mesh too big", "no model"])
def test_a_real_process_ends_with_code_2(name, world):
    case = next(case for case in CASES if case.name == name)
    process = start(["-m", "jaxpar", *words(case.line, world)], devices=8)
    assert process.wait(60) == 2, process.output
    one_sentence(process.output, case.words)


def test_the_working_command_works(world, capsys):
    """What the cases above are changed from: otherwise they would prove nothing."""
    assert main([*words(TRAIN, world), "--folder", str(world.parent / "works")]) == 0
    assert (world.parent / "works" / "loss.png").is_file()


def test_no_disk_space(world, capsys, monkeypatch):
    folder = world.parent / "full"
    shutil.copytree(world / "run", folder)
    before = snapshot(folder / "checkpoints")
    full = type(shutil.disk_usage("/"))(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert main([*words(TRAIN, world), "--folder", str(folder), "--steps", "4"]) == 2
    one_sentence(capsys.readouterr().err, ("no space", "step 4", "steps 2", "intact"))
    assert snapshot(folder / "checkpoints") == before


def test_a_disk_that_fills_up_while_saving(world, capsys, monkeypatch):
    from jaxpar import manifest

    folder = world.parent / "filled"
    shutil.copytree(world / "run", folder)
    before = snapshot(folder / "checkpoints")

    def write(folder, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manifest, "write", write)
    assert main([*words(TRAIN, world), "--folder", str(folder), "--steps", "4"]) == 2
    one_sentence(capsys.readouterr().err, ("step 4", "no space left", "steps 2", "intact"))
    assert snapshot(folder / "checkpoints") == before


def test_a_folder_that_is_not_writable(world, capsys, monkeypatch):
    def mkdir(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    before = snapshot(world)
    assert main([*words(TRAIN, world), "--no-compile-cache"]) == 2
    one_sentence(capsys.readouterr().err, ("new", "Permission denied"))
    assert snapshot(world) == before


def test_a_bug_keeps_its_traceback(world, monkeypatch):
    """Only what is checked beforehand may end in a sentence: an error of the loop must be seen whole."""
    import jaxpar.train

    def loop(*args):
        raise ValueError("a bug")

    monkeypatch.setattr(jaxpar.train, "loop", loop)
    with pytest.raises(ValueError, match="a bug"):
        main([*words(TRAIN, world), "--folder", str(world.parent / "bug")])
