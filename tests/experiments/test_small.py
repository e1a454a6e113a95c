"""Studies of many small runs: what they train on, and that they write what they found."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.experiments.checkfree import compare
from jaxpar.experiments.skippipe import training
from jaxpar.experiments.small import Runs, controls, texts
from jaxpar.models.config import ModelConfig
from jaxpar.optimisers_config import AdamW, Constant


def test_a_stretch_is_its_steps_one_after_the_other():
    """Batches are those at the state's position, and go round when they are used up."""
    data = texts(16, 4, 3, held_out=2)
    cfg = ModelConfig(vocabulary=data.vocabulary, layers=2, width=16, heads=2)
    runs = Runs(cfg, AdamW(schedule=Constant(1e-2)), data, 5)
    (state, metrics), *more = runs.train(runs.start(0), controls(5, 4), 5)
    assert not more
    alone, losses = runs.start(0), []
    update = jax.jit(runs.step.update)
    for i in range(5):
        alone, found = update(alone, jax.tree.map(lambda x, i=i: x[i % 3], data.train))
        losses.append(found["loss"])
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-4)
    assert int(state.data_position) == 20
    loss = runs.held_out(state.params)
    sums = [runs.program.eval_fn(state.params, jax.tree.map(lambda x, i=i: x[i], data.held_out)) for i in range(2)]
    np.testing.assert_allclose(loss, sum(s[0] for s in sums) / sum(s[1] for s in sums), rtol=1e-5)
    assert not np.array_equal(runs.start(0).params["embedding"]["tokens"], runs.start(1).params["embedding"]["tokens"])
    assert jnp.isfinite(loss)


def test_training_with_skipped_stages_writes_its_tables(tmp_path, capsys):
    line = [
        "--width",
        "16",
        "--length",
        "16",
        "--rows",
        "6",
        "--steps",
        "4",
        "--seeds",
        "1",
        "--skipped",
        "0",
        "3",
        "--out",
        str(tmp_path),
    ]
    training.main(line)
    runs = json.loads((tmp_path / "training.json").read_text())["runs"]
    assert [run["skipped"] for run in runs.values()] == [0, 3]
    for run in runs.values():
        assert all(2 < loss < 8 for loss in run["losses"].values())
        assert len(set(run["losses"].values())) > 4
    assert "| without 2 |" in (tmp_path / "training.md").read_text()
    assert (tmp_path / "training.png").stat().st_size > 1000
    assert "| whole |" in capsys.readouterr().out


def test_strategies_on_the_same_failures_write_their_tables(tmp_path, capsys):
    """A snapshot goes back and does its batches again: fewer steps in as many iterations, by the closed form's formula."""
    line = ["--width", "16", "--length", "16", "--rows", "4", "--iterations", "20", "--rates", "0.1", "--seeds", "1"]
    found = compare.main([*line, "--only", "no failure", "snapshot every 5", "--out", str(tmp_path)])
    runs = {run["entry"]: run for run in found["runs"].values()}
    assert set(runs) == {"no failure", "snapshot every 5", "no failure, swaps"}
    assert runs["no failure"]["steps"][-1] == 20
    back = runs["snapshot every 5"]
    assert back["failures"] > 0
    assert back["steps"][-1] < 20
    # What is behind a rollback is the run without failures.
    at = back["steps"][-1] // 2 - 1
    assert back["steps"][-1] % 2 or back["held_out"][-1] == runs["no failure"]["held_out"][at]
    assert (
        "no failure, swaps, stage 0 from 1"
        in json.loads((tmp_path / "compare.json").read_text())["edge_copies"]["seed 0"]
    )
    assert "snapshot every 5" in (tmp_path / "compare.md").read_text()
    assert (tmp_path / "compare.png").stat().st_size > 1000
    assert "swap tax" in capsys.readouterr().out


def test_the_closed_form_by_simulation():
    rate, every = 0.02, 10
    draw = np.random.default_rng(0)
    done = iterations = 0
    while done < 20000:
        lost = draw.random() < 1 - (1 - rate) ** 4
        iterations += 1
        done = done // every * every if lost else done + 1
    assert abs(iterations / done - compare.factor(rate, every)) < 0.05
