"""The study of formats on a model's tensors, on a tiny model: it sees every product, and writes what it found."""

import json

import jax
import numpy as np

from jaxpar.experiments.formats import qsnr
from jaxpar.models import decoder
from jaxpar.presets import llama


def test_every_product_of_the_layers_is_seen():
    cfg = llama(2, 32, 4, vocabulary=64, context=32)
    params = decoder.init(cfg, jax.random.key(0))
    found = qsnr.operands(cfg, params, np.arange(16, dtype=np.int32)[None])
    layers = params["layers"]
    # Query, key, value, out, and three of the feed-forward part; q, k, v read the same x, and so do gate and up.
    assert len(found["weights"]) == 2 * 7
    assert len(found["activations"]) == 2 * 4
    seen = [w for w in found["weights"] if w.shape == (cfg.width, cfg.width)]
    query = np.asarray(layers["attention"]["query"]["kernel"]).reshape(2, cfg.width, cfg.width)
    assert all(any(np.array_equal(w, q) for w in seen) for q in query)
    assert all(x.shape[0] == 16 and x.dtype == np.float32 for x in found["activations"])


def test_it_writes_its_tables(tmp_path, capsys):
    line = ["--model", "tiny", "--rows", "1", "--length", "32", "--pairs", "mxint4", "nvint4"]
    found = qsnr.main([*line, "--out", str(tmp_path), "--folder", str(tmp_path)])
    results = json.loads((tmp_path / "qsnr.json").read_text())["results"]
    assert results == found["results"]
    assert len(results) == 2 * 2 * 2
    # Random weights are normally distributed: the formula's winners.
    won = {r["integer"]: r["wins"] for r in results.values() if r["kind"] == "weights" and not r["rotated"]}
    assert won == {"mxint4": 0.0, "nvint4": 1.0}
    row = results["weights, nvint4 and nvfp4, plain"]
    assert 0.6 < row["below"] < 0.9
    assert 1.9 < row["quartiles"][1] < 2.2
    assert "| 14 weights | nvint4, nvfp4 | no | 100 % |" in (tmp_path / "qsnr.md").read_text()
    assert (tmp_path / "qsnr.png").stat().st_size > 1000
    assert "| 8 activations |" in capsys.readouterr().out


def test_crests_are_of_blocks_along_the_axis():
    x = np.zeros((4, 32), np.float32)
    x[0, :] = 1
    x[1, 5] = 3
    np.testing.assert_allclose(qsnr.blocks_crests(x, 16, -1), [1, 1, 4])
    np.testing.assert_allclose(sorted(qsnr.blocks_crests(x, 4, 0)), [3 / np.sqrt(10 / 4), *[2.0] * 31])
