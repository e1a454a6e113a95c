"""The benchmark runs from end to end, on one small size and without PyTorch."""

import json

from jaxpar.experiments.bench import train_step


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
