"""The studies of routing at their smallest: every curve is there, and what must be below what is."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxpar.experiments.adaptive import duo, ffn_skipping
from jaxpar.models import decoder
from jaxpar.presets import llama

init = jax.jit(decoder.init, static_argnums=0)


class Untrained:
    """In place of `Runs`: what training is has tests of its own."""

    def __init__(self, cfg, *more):
        self.cfg = cfg

    def start(self, seed):
        return SimpleNamespace(params=init(self.cfg, jax.random.key(seed)))

    def train(self, state, controls, every):
        yield state, {"loss": np.zeros(every)}


def test_duo_writes_its_curves(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(duo, "Runs", Untrained)
    line = "--layers 2 --width 16 --length 16 --rows 4 --steps 4 --seeds 1 --router-steps 2 --held-out 2 --turns 2"
    found = duo.main([*line.split(), "--sequential-rows", "2", "--out", str(tmp_path)])
    rows = found[0]["budgets"]
    assert list(rows) == [0, 1, 2]
    for row in rows.values():
        assert row["oracle, uniform"] <= row["fixed"] + 1e-9 <= row["random"] + 2e-9
        assert row["null"] <= row["null, mean"] + 1e-9
    assert 0 <= rows[1]["router, share"] <= 1
    assert rows[0]["flops"] < rows[1]["flops"] < rows[2]["flops"]
    assert "| 1 of 2 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "duo.json").read_text())["results"]["0"]["difficulty"]["mean"] >= 0
    assert (tmp_path / "duo.png").stat().st_size > 0


def test_ffn_skipping_compares_remedies(tmp_path, capsys, monkeypatch):
    cfg = llama(4, 16, 4, context=16, vocabulary=32)
    tokens = np.random.default_rng(0).integers(0, 32, (2, 13))
    monkeypatch.setattr(ffn_skipping, "trained", lambda options: (cfg, init(cfg, jax.random.key(0)), tokens))
    every = ffn_skipping.cases
    wanted = {("ffn, cosine", ""), ("layer, fixed", "mask"), ("layer, fixed", "recompute")}
    some = lambda *args: [case for case in every(*args) if case[:2] in wanted]
    monkeypatch.setattr(ffn_skipping, "cases", some)
    line = "--length 12 --first 1 --warmup 2 --quantiles 0.0 --shares 0.5"
    found = ffn_skipping.main([*line.split(), "--out", str(tmp_path)])
    # Two free layers: one is looked at, the other left out; fixed, one of two.
    assert [row["share"] for row in found["rows"]] == pytest.approx([1 / 4] * 3)
    cosine, mask, recompute = found["rows"]
    assert 0 < cosine["flops saved"] < mask["flops saved"] == pytest.approx(1 / 4)
    assert recompute["flops saved"] is None
    assert "whole model:" in capsys.readouterr().out
    assert (tmp_path / "ffn_skipping.json").is_file()
    assert (tmp_path / "ffn_skipping.png").stat().st_size > 0
