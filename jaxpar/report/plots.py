"""The loss plot of a run, made from metrics.jsonl."""

from __future__ import annotations

import os
from pathlib import Path

from jaxpar.report.writers import read_lines

LOST = "recovery/lost"
"""The metric that is above 0 where stages of the model were lost (see `jaxpar.recovery.transform`)."""


def loss_plot(
    metrics: str | Path,
    out: str | Path,
    *,
    train: str = "loss",
    held_out: str = "held_out/loss",
    baseline: float | None = None,
    tokens_per_step: int | None = None,
    title: str = "",
) -> Path | None:
    """Training and held-out loss against steps (and tokens, on a second scale), and the bigram model's line; where stages
    of the model were lost, a mark below.

    Args:
      metrics: the run's metrics.jsonl.
      out: the PNG; replaced by one rename, so that a viewer never sees half of it.
      train, held_out: the names of the two losses, in nats per token.
      baseline: the bigram model's loss, in nats per token.
      tokens_per_step: for the scale of tokens.

    Returns:
      `out`, or None if no loss was written yet.
    """
    # Figure without pyplot: no global state, no window, and a notebook's own figures are left alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_lines(metrics)
    series = {
        name: [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)]
        for name in (train, held_out)
    }
    if not any(series.values()):
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if series[train]:
        steps, losses = zip(*series[train], strict=True)
        window = max(1, len(losses) // 100)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3 if window > 1 else 1.0, lw=0.8, label="training")
        if window > 1:
            axes.plot(steps, smooth(losses, window), color="tab:blue", label=f"training, mean of {window}")
    if series[held_out]:
        axes.plot(*zip(*series[held_out], strict=True), "o-", color="tab:orange", ms=3, label="held-out")
    if lost := [r["step"] for r in records if r.get(LOST)]:
        # On the lower edge, whatever the losses are.
        edge = axes.get_xaxis_transform()
        axes.plot(
            lost, [0.0] * len(lost), "^", color="tab:red", ms=5, transform=edge, clip_on=False, label="stages lost"
        )
    if baseline is not None:
        axes.axhline(baseline, color="tab:gray", ls="--", label=f"bigram model, {baseline:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    if tokens_per_step:
        to, back = (lambda s: s * tokens_per_step), (lambda t: t / tokens_per_step)
        axes.secondary_xaxis("top", functions=(to, back)).set_xlabel("tokens")
    out = Path(out)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=120)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return out


def smooth(values, window: int) -> list[float]:
    """The mean of each value and up to `window - 1` before it."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        out.append(total / min(i + 1, window))
    return out
