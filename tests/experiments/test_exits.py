"""The studies of early exits train, ask and decode through one module; the benchmark of decoding runs from end to end."""

import json

from jaxpar.experiments.bench import decode


def test_decode_quick(tmp_path, capsys):
    results = decode.main(["--quick", "--out", str(tmp_path)])
    found = results["decoding"]
    assert found["plain"]["speed"] == 1.0
    drafts = found["drafts of 2 behind layer 1"]
    assert drafts["agreement"] == 1.0
    assert 1 <= drafts["tokens_per_round"] <= 3
    never = found["threshold 1 (never), recompute"]
    assert (never["agreement"], never["depth"]) == (1.0, 3.0)
    assert (tmp_path / "decode_cpu.png").stat().st_size > 1000
    assert json.loads((tmp_path / "decode_cpu.json").read_text())["results"] == results
