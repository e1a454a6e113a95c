"""The studies of training and casting in few bits, at a tiny size: they see what they say, and write what they found."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.experiments.formats import direct_cast, training
from jaxpar.models import decoder
from jaxpar.presets import llama

SMALL = ["--layers", "1", "--width", "32", "--heads", "1", "--length", "32", "--rows", "2", "--steps", "3"]


def test_training_in_few_bits_is_compared_with_float32(tmp_path):
    name = "mxint8-ocp, asymmetric"
    found = training.main([*SMALL, "--seeds", "1", "--formats", name, "--out", str(tmp_path)])
    results = json.loads((tmp_path / "training.json").read_text())["results"]
    assert results == found["results"]
    assert list(results) == ["float32", name]
    row = results[name]
    assert row["losses"] != results["float32"]["losses"]
    assert 1e-4 < row["error"] < 0.5
    assert abs(row["bias"]) < row["error"]
    # What is rounded to -128, though its scale has room for -127 only.
    assert 0 < row["extreme"] < 0.2
    assert f"| {name} |" in (tmp_path / "training.md").read_text()
    assert (tmp_path / "training.png").stat().st_size > 1000


def test_casts_are_compared_with_the_model_as_it_is(tmp_path):
    line = [*SMALL, "--casts", "mxint4", "--comet", "w4ax", "--plain", "--group", "16"]
    found = direct_cast.main([*line, "--out", str(tmp_path), "--folder", str(tmp_path)])
    results = json.loads((tmp_path / "direct_cast.json").read_text())["results"]
    assert results == found["results"]
    assert list(results) == ["unrounded", "mxint4", "w4ax", "w4axkv4"]
    assert abs(results["unrounded"]["kl"]) < 1e-6
    assert 0 < results["w4ax"]["kl"] < results["w4axkv4"]["kl"] < 1
    assert 0 < results["w4ax"]["four"]["all"] <= 1
    assert results["mxint4"]["four"] is None
    assert "| w4axkv4 |" in (tmp_path / "direct_cast.md").read_text()


def test_the_distance_is_that_of_two_distributions():
    """Against the definition, in float64."""
    rng = np.random.default_rng(0)
    cfg = llama(1, 32, 1, vocabulary=64, context=32)
    params = jax.jit(decoder.init, static_argnums=0)(cfg, jax.random.key(0))
    tokens = rng.integers(0, 64, (1, 8), np.int32)
    p = jax.nn.log_softmax(jnp.asarray(rng.standard_normal((8, 64)), jnp.float32))
    q = np.asarray(direct_cast.log_probabilities(cfg, params, tokens, direct_cast.Ops(), None)[0], np.float64)
    found = direct_cast.compare(cfg, params, tokens, direct_cast.Ops(), None, [p])
    exact = (np.exp(np.asarray(p, np.float64)) * (np.asarray(p, np.float64) - q)).sum(-1).mean()
    np.testing.assert_allclose(found["kl"], exact, rtol=1e-5)
    np.testing.assert_allclose(found["loss"], -q[np.arange(7), tokens[0, 1:]].mean(), rtol=1e-6)
