"""`jaxpar steer` and `generate --steer`, from end to end with a model of random weights."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxpar.cli import main
from jaxpar.generation import continued
from jaxpar.loading import Loaded
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.steering import Vector

CFG = ModelConfig(vocabulary=128, layers=2, width=16, heads=2, hidden=24, context=64, init_std=0.3)
PARAMS = jax.jit(decoder.init, static_argnums=0)(CFG, jax.random.key(0))
LOADED = Loaded(CFG, PARAMS, lambda text: list(text.encode()), lambda ids: bytes(ids).decode(), (), 128, "a model")


@pytest.fixture
def world(tmp_path, monkeypatch, capsys):
    """(command line) -> exit code, what was said; `loaded` is what any path holds."""
    loaded = {"model": LOADED}
    monkeypatch.setattr("jaxpar.loading.load", lambda path: loaded["model"])
    # The ends are what the texts of a pair differ in.
    pairs = [{"wanted": f"{word} a.", "other": f"{word} is longer!"} for word in ("one", "four", "eleven", "x")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n\n")

    def run(line):
        code = main([word.format(w=tmp_path) for word in line.split()])
        said = capsys.readouterr()
        return code, said.out, said.err

    return tmp_path, run, loaded


STEER = "steer --pairs {w}/pairs.jsonl --out {w}/v.npz --layer 1 --divergence 0.01 --no-compile-cache"
GENERATE = "generate --no-compile-cache --tokens 6 --prompt one --steer {w}/v.npz"


def test_a_vector_is_made_and_generation_is_steered_by_it(world):
    folder, run, loaded = world
    code, said, _ = run(STEER)
    assert code == 0
    assert "4 pairs behind layer 1 of 2; 4 of them point along the mean" in said
    vector = Vector.load(folder / "v.npz")
    moved = float(said.split("measured on 4 texts: ")[1].split()[0])
    assert 0 < moved < 0.01, "the bound"

    def expected(strength):
        steering = vector.steering(CFG, PARAMS, strength)
        return "one" + LOADED.decode(continued(CFG, PARAMS, [list(b"one")], new_tokens=6, steering=steering).rows[0])

    assert vector.strength > 0
    code, said, noted = run(GENERATE)
    assert said.rstrip("\n") == expected(vector.strength)
    assert f"steered behind layer 1 of 2, {vector.strength:.4g} times the vector" in noted
    assert run(GENERATE + " --steer-strength -40")[1].rstrip("\n") == expected(-40) != expected(0)

    scaled = jax.tree.map(lambda x: x, PARAMS)
    scaled["layers"]["feedforward"]["down"]["kernel"] = scaled["layers"]["feedforward"]["down"]["kernel"] * 1.01
    loaded["model"] = replace(LOADED, params=scaled)
    code, _, said = run(GENERATE)
    assert code == 2
    assert f"weights with the mark {vector.mark}" in said
    loaded["model"] = replace(LOADED, cfg=CFG.replace(layers=3))
    assert "16 numbers for layer 1 of 2, but this model has width 16 and 3 layers" in run(GENERATE)[2]
    loaded["model"] = LOADED
    for more, words in (
        (" --decoding speculate --decoding.layer 1", "leave --steer or --decoding away"),
        (" --steer-strength nan", "a steering strength of nan"),
        (" --steer {w}/pairs.jsonl", "holds no whole steering vector"),
        (" --steer {w}/gone.npz", "there is no steering vector"),
    ):
        code, _, said = run(GENERATE + more)
        assert (code, words in said) == (2, True), said


@pytest.mark.quick
def test_pairs_without_a_common_sign_are_refused_and_nothing_is_written(world):
    folder, run, _ = world
    there = {"wanted": "one a.", "other": "one is longer!"}
    back = {"wanted": there["other"], "other": there["wanted"]}
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, (there, back))))
    code, _, said = run(STEER)
    assert code == 2
    assert "the sign is chance: 0 of 2 pairs point along the mean of the others behind layer 1 of 2" in said
    assert not (folder / "v.npz").exists()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('{"wanted": "a"}', STEER, "line 1, is no pair"),
        ('{"wanted": "a", "other": "b"}\n{"wanted": "a", "other": ""}', STEER, "line 2, is no pair"),
        ('{"wanted": "a", "other": "b"}', STEER, "holds 1 pairs"),
        (None, STEER.replace("--layer 1", "--layer 2"), "no layer 2 to steer behind: the model has layers 0 to 1"),
        (None, STEER.replace("0.01", "0"), "divergence = 0 nats"),
        (None, STEER.replace("v.npz", "nowhere/v.npz"), "no folder"),
        (None, "generate --steer-strength 2 --prompt a", "steer_strength = 2 multiplies a vector, and none is given"),
    ],
)
def test_bad_input_is_one_sentence(text, line, words, world):
    folder, run, _ = world
    if text is not None:
        (folder / "pairs.jsonl").write_text(text)
    code, _, said = run(line)
    assert code == 2
    assert words in said
    assert said.count("\n") == 1
    assert not list(folder.glob("**/*.npz"))


@pytest.mark.quick
def test_a_text_longer_than_the_context(world):
    folder, run, _ = world
    pair = json.dumps({"wanted": "a" * 65, "other": "b"})
    (folder / "pairs.jsonl").write_text(f"{pair}\n{pair}")
    assert "65 tokens, more than the model's context of 64" in run(STEER)[2]
    np.testing.assert_equal(list(folder.glob("*.npz")), [])
