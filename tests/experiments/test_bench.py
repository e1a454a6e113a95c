"""The benchmark runs from end to end, on one small size and without PyTorch."""

import json

from jaxpar.experiments.bench import depth_mixers, parallel, recovery, start_up, train_step


def test_train_step_quick(tmp_path, capsys):
    out = tmp_path / "figures.json"
    train_step.main(["--quick", "--out", str(out)])
    text = capsys.readouterr().out
    assert "jaxpar" in text
    assert "tokens/s" in text
    written = json.loads(out.read_text())
    assert {"date", "chip", "versions", "command", "platform"} <= written.keys()
    [result] = written["results"]
    ours = result["contenders"]["jaxpar"]
    assert "error" not in ours, ours
    assert len(ours["seconds"]) == result["rounds"]
    assert ours["tokens_per_second"] > 0
    assert ours["peak_bytes"] > 1e6


def test_start_up(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(60):
        (texts / f"{i}.txt").write_text(f"{i} quick brown foxes jump over the lazy dog\n" * 10)
    out = tmp_path / "figures.json"
    small = [
        "tiny",
        "--source",
        str(texts),
        "--validation-fraction",
        "0.3",
        "--layers",
        "1",
        "--width",
        "16",
        "--heads",
        "2",
    ]
    medians = start_up.main(["--repeat", "1", "--out", str(out), "--", *small])
    assert 0 < medians["help"] < medians["warm"]
    assert json.loads(out.read_text())["seconds"].keys() == {"help", "cold", "warm"}


def test_parallel_ticks(tmp_path):
    """One part, in a process of its own, merged into what stands in the file."""
    out = tmp_path / "figures.json"
    out.write_text(json.dumps({"results": {"memory": {"1f1b, 8 microbatches": {"bytes": 1}}}}))
    results = parallel.main(["--parts", "ticks", "--out", str(out)])
    assert results["memory"]["1f1b, 8 microbatches"] == {"bytes": 1}
    # p = 4, m = 8: (m + p - 1) / m, and zero-bubble schedules below it.
    assert results["ticks"]["1f1b, 4 stages, 8 microbatches"]["ratio"] == 11 / 8
    assert results["ticks"]["zb-h1, 4 stages, 8 microbatches"]["ratio"] < 11 / 8
    assert json.loads(out.read_text())["results"] == results
    assert out.with_suffix(".png").stat().st_size > 1000


def test_recovery_and_depth_mixers(tmp_path, capsys):
    """A strategy and an operator have their lines, with a ratio, bytes and an error."""
    only = ["--only", "check-free", "replica-peer"]
    result = recovery.main(["--quick", *only, "--out", str(tmp_path / "recovery.json")])
    assert set(result["healthy"]) == {"plain", "again", "check-free"}
    assert all(len(row["all"]) == 3 and row["ratio"] > 0 for row in result["healthy"].values())
    exact = {name for name, row in result["recoveries"].items() if row["exact"]}
    assert exact == {"replica-peer", "checkpoint-rollback"}
    assert all((row["relative_error"] == 0) == (name in exact) for name, row in result["recoveries"].items())
    small = ["--layers", "2", "--width", "16", "--length", "16", "--rows", "2", "--rounds", "2", "--only", "deep delta"]
    result = depth_mixers.main([*small, "--out", str(tmp_path)])
    assert set(result[2]) == {"plain", "again", "deep delta", "deep delta, 4 channels over tokens"}
    assert result[2]["deep delta"]["bytes_ratio"] > 1 == result[2]["plain"]["ratio"]
    assert result[2]["deep delta, 4 channels over tokens"]["wire_ratio"] == 4
    assert (tmp_path / "depth_mixers_cpu.png").stat().st_size > 1000
    assert "deep delta" in capsys.readouterr().out
