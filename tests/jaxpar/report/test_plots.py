"""The loss plot: drawn from metrics.jsonl, replaced in one go, without pyplot."""

import subprocess
import sys

import numpy as np
import pytest

from jaxpar.report.plots import loss_plot, smooth
from jaxpar.report.writers import JsonLines


@pytest.fixture
def metrics(tmp_path):
    writer = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(1, 301):
        writer.write(step, {"loss": 5.0 / step**0.3})
        if step % 50 == 0:
            writer.write(step, {"held_out/loss": 5.2 / step**0.3})
    writer.write(301, {"loss": float("nan")})
    writer.close()
    return tmp_path / "metrics.jsonl"


def pixels(path):
    from matplotlib.image import imread

    return (imread(path)[:, :, :3] * 255).astype(int)


def count(image, colour):
    return int((np.abs(image - np.array(colour)).max(-1) < 12).sum())


BLUE, ORANGE, GRAY, RED = (31, 119, 180), (255, 127, 14), (127, 127, 127), (214, 39, 40)


def test_it_shows_both_losses_and_the_baseline(metrics, tmp_path):
    out = loss_plot(metrics, tmp_path / "loss.png", baseline=3.0, tokens_per_step=1000, title="a run")
    assert out == tmp_path / "loss.png"
    image = pixels(out)
    assert min(count(image, BLUE), count(image, ORANGE), count(image, GRAY)) > 200
    without = pixels(loss_plot(metrics, tmp_path / "loss.png", held_out="absent"))
    assert count(without, ORANGE) == 0
    assert count(without, GRAY) < count(image, GRAY)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_it_marks_where_stages_were_lost(metrics, tmp_path):
    plain = pixels(loss_plot(metrics, tmp_path / "loss.png"))
    with metrics.open("a") as file:
        file.write(
            '{"step": 100, "recovery/lost": 1.0}\n{"step": 200, "recovery/lost": 2.0}\n{"step": 250, "recovery/lost": 0.0}\n'
        )
    marked = pixels(loss_plot(metrics, tmp_path / "loss.png"))
    assert count(plain, RED) == 0
    assert count(marked, RED) > 40
    # Two marks on the lower edge of the axes, at a third and two thirds of the steps, and one in the legend.
    rows, columns = np.nonzero(np.abs(marked - np.array(RED)).max(-1) < 12)
    low = columns[rows > marked.shape[0] * 0.8]
    gaps = np.flatnonzero(np.diff(np.unique(low)) > 5)
    assert len(gaps) == 1


def test_nothing_to_show(tmp_path):
    JsonLines(tmp_path / "m.jsonl").close()
    assert loss_plot(tmp_path / "m.jsonl", tmp_path / "loss.png") is None
    assert not (tmp_path / "loss.png").exists()


def test_no_pyplot(metrics, tmp_path):
    code = (
        "import sys; from jaxpar.report.plots import loss_plot; loss_plot(*sys.argv[1:]); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(metrics), str(tmp_path / "loss.png")]
    assert subprocess.run(command, timeout=60).returncode == 0


def test_smooth():
    assert smooth([1, 2, 3, 4, 5], 2) == [1, 1.5, 2.5, 3.5, 4.5]
    assert smooth([3.0], 10) == [3.0]
