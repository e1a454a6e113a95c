"""The program as a person uses it: help, a run, and what can be done with a run."""

import inspect
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from jaxpar import __version__, manifest, options
from jaxpar.cli import COMMANDS, main
from jaxpar.commands.convert import ConvertConfig
from jaxpar.commands.formats import FormatsConfig
from jaxpar.commands.generate import GenerateConfig
from jaxpar.commands.inspect import InspectConfig
from jaxpar.commands.plan import PlanConfig
from jaxpar.commands.schedule import ScheduleConfig
from jaxpar.commands.steer import SteerConfig
from jaxpar.commands.tokenizer import TokenizerConfig
from jaxpar.parallel.topology import installed
from jaxpar.presets import DEFAULT, PRESETS, tiny
from jaxpar.report.finish import same
from jaxpar.report.writers import read_lines
from jaxpar.tuning import TuneConfig
from tests.processes import start

STEPS = 6


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(inspect.getsource(random))
    return file


def words(folder: Path, text: Path, *more: str) -> list[str]:
    small = "--layers 2 --width 32 --heads 4 --evaluate-batches 1 --sample.tokens 8 --progress lines"
    paths = ["--folder", str(folder), "--source", str(text), "--data.cache-dir", str(text.parent / "cache")]
    schedule = [] if "sgd" in more else ["--warmup", "2"]
    return ["train", "tiny", *paths, *small.split(), *schedule, "--steps", str(STEPS), *more]


@pytest.fixture(scope="module")
def run(tmp_path_factory, text_file) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    every = ("--checkpoint-every", "2", "--inspect-every", "4", "--profile.start", "2", "--profile.steps", "2")
    assert main(words(folder, text_file, *every)) == 0
    return folder


# -- help ----------------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("line", [["--help"], ["train", "--help"], ["generate", "--help"], ["--version"]], ids=" ".join)
def test_help_does_not_import_what_is_slow(line):
    """Start-up below a second is mostly this; a limit on the clock would fail on a loaded machine."""
    program = (
        "import sys; from jaxpar.cli import main; code = main(sys.argv[1:]); "
        "slow = {'jax', 'torch', 'transformers', 'orbax', 'matplotlib', 'tensorboard', 'pyarrow', 'grain'}; "
        "print('slow modules:', sorted(slow & set(sys.modules))); sys.exit(code)"
    )
    process = start(["-c", program, *line])
    assert process.wait(60) == 0, process.output
    assert process.output.endswith("slow modules: []\n"), process.output


@pytest.mark.quick
def test_the_program_lists_its_commands(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"{name:<10} {command.summary}" in listed
    assert main([]) == 0
    assert capsys.readouterr().out == listed


def test_the_version(capsys):
    for word in ("--version", "version"):
        assert main([word]) == 0
        assert capsys.readouterr().out == f"jaxpar {__version__}\n"


@pytest.mark.parametrize(
    ("line", "config", "units"),
    [
        (
            "train",
            tiny(),
            ("updates in all", "tokens in a row T", "rows in a batch B", "steps of warm-up", "in tokens"),
        ),
        ("explain", tiny(), ("how many devices lie along each axis", "--compile")),
        ("generate", GenerateConfig(), ("the most tokens to add", "divides the logits")),
        ("schedule", ScheduleConfig(), ("devices along the pipeline", "or a .csv file of tasks")),
        ("plan", PlanConfig(), ("pieces of the model", "or a .toml or .csv file")),
        ("formats", FormatsConfig(), ("for each measurement", "mxint8-asymmetric")),
        ("tune", TuneConfig(), ("quant_matmul", "tokens in a row", "JAXPAR_TUNE_CACHE")),
        ("inspect", InspectConfig(), ("tokens of a row", "probability less the second")),
        ("steer", SteerConfig(), ("a hundred pairs", "in nats")),
        ("convert", ConvertConfig(), ("new, or empty", "dtype")),
        ("tokenizer", TokenizerConfig(), ("number of token ids",)),
        ("doctor", None, ("what is installed",)),
    ],
    ids=list(COMMANDS),
)
def test_every_option_stands_in_the_help(line, config, units, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([line, "--help"]) == 0
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for entry in options.entries(config) if config is not None else ():
        if not entry.nested and not entry.members:
            assert entry.flag in shown, entry.flag
    for unit in units:
        assert unit in shown, unit


@pytest.mark.quick
def test_presets_are_configurations_of_their_own_folder():
    folders = [preset().folder for preset in PRESETS.values()]
    assert len(set(folders)) == len(PRESETS)


# -- a run ---------------------------------------------------------------------------------------------------------------


def test_a_run_says_how_it_goes_on():
    from jaxpar.report.finish import same

    first, small = PRESETS["first"](), tiny()
    known = lambda config: config.replace(model=config.model.replace(vocabulary=320))
    assert same(known(first)) == "jaxpar train"
    assert same(known(small).replace(steps=7)) == "jaxpar train tiny"
    assert same(known(small).replace(folder="elsewhere")) == "jaxpar train tiny --folder elsewhere"
    assert same(known(small).replace(seed=1)) == "the same command with"


def test_a_run_writes_all_its_files(run):
    lines = read_lines(run / "metrics.jsonl")
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines if "loss" in line)
    assert [line["step"] for line in lines if "held_out/loss" in line] == [STEPS]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert manifest.steps(run / "checkpoints") == [2, 4, 6]
    for step in (2, 4, 6):
        assert manifest.verify(run / "checkpoints" / manifest.name_of(step))["step"] == step
    assert (run / "sample.txt").read_text().startswith("def ")
    assert list((run / "profile").rglob("*.xplane.pb"))
    assert [line["step"] for line in lines if "inspect/lens_loss/02" in line] == [4, STEPS]
    assert (run / "inspect.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_tensorboard_reads_what_was_written(run):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    [file] = run.glob("events.out.tfevents.*")
    found: dict[str, list[int]] = {}
    reader = PyRecordReader_New(str(file))
    while True:
        try:
            reader.GetNext()
        except Exception:  # the reader's end of file
            break
        event = Event.FromString(reader.record())
        for value in event.summary.value:
            found.setdefault(value.tag, []).append(event.step)
    assert found["loss"] == list(range(1, STEPS + 1))
    assert found["held_out/loss"] == [STEPS]
    assert any("sample" in tag for tag in found)
    assert found["inspect"] == [4, STEPS], "the pictures"
    assert found["inspect/cosine/feedforward/01"] == [4, STEPS]


def test_inspect_tells_and_writes(run, text_file, tmp_path, capsys):
    line = ["inspect", "--model", str(run), "--source", str(text_file), "--rows", "1", "--length", "32"]
    assert main([*line, "--out", str(tmp_path / "look"), "--confidence", "0.2"]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "look" / "inspect.json").read_text())
    assert found["layers"] == 2
    assert found["tokens"] == 32
    assert f"{found['lens_loss'][2]:8.4f}" in out
    assert len(found["exits"]) == 1
    assert (tmp_path / "look" / "inspect.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_run_tells(run, text_file, tmp_path, capsys):
    assert main(words(tmp_path / "run", text_file)) == 0
    out = capsys.readouterr().out
    assert "bigram model: held-out loss" in out
    assert re.search(r"held-out loss \d\.\d{4} nats per token after 6 steps", out)
    assert (tmp_path / "run" / "sample.txt").read_text() in out
    for line in ("jaxpar generate --model", "--mesh data=2,fsdp=2,tensor=2", "tensorboard"):
        assert line in out
    # No preset alone gives this run, so it cannot be named in one short line.
    assert f"the same command with --steps {2 * STEPS}" in out


@pytest.mark.quick
def test_a_preset_is_gone_on_with_by_its_name():
    def prepared(config, **changes):
        return config.replace(model=config.model.replace(vocabulary=300), **changes)

    assert same(prepared(PRESETS[DEFAULT]())) == "jaxpar train"
    assert same(prepared(tiny(), folder="elsewhere", steps=7)) == "jaxpar train tiny --folder elsewhere"
    assert same(prepared(tiny(), seed=5)) == "the same command with"


def test_the_same_command_again_has_nothing_to_do_and_a_longer_one_goes_on(run, text_file, tmp_path, capsys):
    line = words(tmp_path / "run", text_file)
    assert main(line) == 0
    before = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert main(line) == 0
    assert "going on from step 6 of 6" in capsys.readouterr().out
    losses = lambda rows: [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert losses(read_lines(tmp_path / "run" / "metrics.jsonl")) == losses(before)
    assert main([*line, "--steps", "8"]) == 0
    assert [step for step, _ in losses(read_lines(tmp_path / "run" / "metrics.jsonl"))] == list(range(1, 9))


def test_evaluation_sample_and_generation_use_the_average(text_file, tmp_path):
    import jax

    from jaxpar.loading import load
    from jaxpar.run import prepare
    from jaxpar.steps.ema import averaged

    line = words(tmp_path / "run", text_file, "--step.ema", "ema", "--step.ema.decay", "0.9")
    config = options.parse(tiny(), line[2:], prog="test")
    with prepare(config) as prepared:
        for batch, _ in zip(prepared.batches(), range(4), strict=False):
            prepared.update(batch)
        average = averaged(prepared.state, 0.9)
        for got, expected in zip(jax.tree.leaves(prepared.best_params()), jax.tree.leaves(average), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)
        batches = list(
            prepared.pipeline.validation(config.evaluate_batches, config.data.batch, prepared.program.batch_sharding)
        )

        def loss(params):
            total = sum(np.array(prepared.program.eval_fn(params, batch)) for batch in batches)
            return total[0] / total[1]

        assert prepared.evaluate() == pytest.approx(loss(average), rel=1e-5)
        assert abs(loss(average) - loss(prepared.state.params)) > 1e-3
        prepared.save(wait=True)
    # `generate` and `convert` take the same.
    loaded = load(tmp_path / "run")
    assert loaded.source.endswith("step 4, averaged parameters")
    for got, expected in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "held_out/loss" in line] == [4]


SGD = ("--optimiser", "sgd", "--optimiser.schedule", "constant", "--step.clip", "none", "--checkpoint-every", "2")


def test_a_step_that_is_not_finite_ends_the_run_with_its_checkpoints_intact(text_file, tmp_path, capsys):
    line = words(tmp_path / "run", text_file, *SGD)
    assert main([*line, "--optimiser.schedule.peak", "0.01"]) == 0
    capsys.readouterr()
    assert main([*line, "--optimiser.schedule.peak", "1e30", "--steps", "20"]) == 2
    *progress, err = capsys.readouterr().err.splitlines()
    assert all(re.match(r"step +\d+/20 ", each) for each in progress)
    assert err.startswith("jaxpar: step ")
    assert "nan" in err
    assert "--step.nonfinite skip-nonfinite" in err
    folder = tmp_path / "run" / "checkpoints"
    assert 6 in manifest.steps(folder)
    for step in manifest.steps(folder):
        manifest.verify(folder / manifest.name_of(step))
    assert not manifest.unfinished(folder)
    # A sane learning rate goes on from there.
    assert main([*line, "--optimiser.schedule.peak", "0.01", "--steps", "10"]) == 0


def test_steps_that_are_not_finite_can_be_skipped(text_file, tmp_path, capsys):
    line = words(tmp_path / "run", text_file, *SGD)
    skip = ["--step.nonfinite", "skip-nonfinite", "--optimiser.schedule.peak", "1e38"]
    assert main([*line, *skip]) == 0
    rows = [row for row in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["skip_nonfinite/total"] >= 1


# -- what can be done with a run -------------------------------------------------------------------------------------------


def test_generate(run, capsys):
    line = ["generate", "--model", str(run), "--prompt", "import ", "def f", "--tokens", "5"]
    assert main(line) == 0
    first = capsys.readouterr().out
    assert first.startswith("import ")
    assert "\n---\ndef f" in first
    assert main([*line, "--pages", "paged", "--pages.rows", "1", "--pages.page", "4", "--pages.pages", "5"]) == 0
    through_pages = capsys.readouterr()
    assert through_pages.out == first
    assert "2 prompts on 1 rows: " in through_pages.err
    assert "of 5 pages of 4 tokens at most, 0 evictions" in through_pages.err
    assert main(line) == 0
    assert capsys.readouterr().out == first
    draws = set()
    for seed in ("1", "2"):
        assert main([*line, "--temperature", "1.5", "--seed", seed]) == 0
        draws.add(capsys.readouterr().out)
    assert len(draws) == 2


def test_explain(capsys):
    assert main(["explain", "tiny", "--mesh", "data=2,tensor=16", "--heads", "16", "--width", "64"]) == 0
    out = capsys.readouterr().out
    assert "mesh: data(2) × tensor(16) = 32 devices" in out  # more than there are here
    assert "each device holds: parameters" in out
    assert "[L, D, H_tensor, K]" in out
    assert main(["explain", "tiny", "--mesh", "stage=2,sequence=rest"]) == 0  # of the eight devices that tests have
    out = capsys.readouterr().out
    assert "mesh: stage(2) × sequence(4) = 8 devices" in out
    assert "[L_stage, D, H, K]" in out
    assert main(["explain", "tiny", "--mesh", "sequence=4", "--sequence.attention", "auto"]) == 0
    assert "sequence.attention = auto: ulysses (exposed communication: ulysses" in capsys.readouterr().out
    # What crosses from stage to stage is the residual operator's state.
    sent = {}
    for operator in ("plain", "mudd-former", "hyper-connections"):
        assert main(["explain", "tiny", "--mesh", "stage=2", "--residual", operator]) == 0
        (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("forward to the next stage ")]
        sent[operator] = float(line.split("|")[3].removesuffix("KiB "))
    layers = tiny().model.layers
    assert sent == {"plain": 16.0, "mudd-former": (1 + layers) * 16.0, "hyper-connections": 4 * 16.0}
    assert main(["explain", "tiny", "--topology"]) == 2
    assert "write for instance --topology v5e:2x4" in capsys.readouterr().err
    if not installed():
        assert main(["explain", "tiny", "--topology", "v5e:2x4"]) == 2
        assert "needs libtpu; install jaxpar[tpu-aot]" in capsys.readouterr().err
    assert main(["explain", "tiny", "--mesh", "sequence=3"]) == 2
    assert "does not divide over sequence(3)" in capsys.readouterr().err
    assert main(["explain", "tiny", "--mesh", "data=2,fsdp=2,tensor=2", "--compile"]) == 0
    assert "compil" in capsys.readouterr().out


def test_convert_gives_transformers_the_same_model(run, tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM

    from jaxpar.loading import load
    from jaxpar.models import decoder

    target = tmp_path / "hf"
    assert main(["convert", "--source", str(run), "--target", str(target)]) == 0
    assert f"step {STEPS} -> {target}" in capsys.readouterr().out
    loaded = load(run)
    tokens = np.arange(2 * 20).reshape(2, 20) % 256
    theirs = AutoModelForCausalLM.from_pretrained(target)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    found = decoder.apply(loaded.cfg, loaded.params, tokens).logits
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_tokenizer_of_ones_own(text_file, tmp_path, capsys):
    file = tmp_path / "tokenizer.json"
    assert main(["tokenizer", "train", "--source", str(text_file), "--vocabulary", "300", "--out", str(file)]) == 0
    assert "next: jaxpar train --tokenizer" in capsys.readouterr().out
    assert len(json.loads(file.read_text())["model"]["vocab"]) == 300
    folder = tmp_path / "run"
    assert main(words(folder, text_file, "--tokenizer", str(file), "--steps", "2")) == 0
    assert main(["generate", "--model", str(folder), "--tokens", "4"]) == 0
    assert "def " in capsys.readouterr().out
    assert main(["convert", "--source", str(folder), "--target", str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == file.read_bytes()
    assert main(["generate", "--model", str(tmp_path / "hf"), "--tokens", "4"]) == 0


def test_doctor(capsys):
    assert main(["doctor"]) in (0, 1)
    out = capsys.readouterr().out
    assert "jax" in out
    assert "compiled programs" in out
