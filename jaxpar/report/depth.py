"""A picture of what `jaxpar.inspecting` found, and its table."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np


def weights_of(found: dict) -> tuple[np.ndarray, list[str]] | None:
    """Depth weights as rows [reads, sources], and what each row is. None: the model reads no sources."""
    if found["depth_weights"] is None:
        return None
    rows, names = [], []
    for layer, branches in enumerate(found["depth_weights"]):
        for name, branch in zip(("attention", "feed-forward"), branches, strict=True):
            which = ("",) if branch is None or len(branch) == 1 else (" query", " key", " value")
            for suffix, row in zip(which, branch or (), strict=False):
                rows.append(row)
                names.append(f"{layer} {name}{suffix}")
    return np.asarray(rows), names


def picture(found: dict, title: str = "") -> bytes:
    """PNG: depth weights where there are any, norms, cosines, the lens, and exits."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    weights = weights_of(found)
    count = 4 + (weights is not None)
    figure = Figure(figsize=(4.2 * count, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, count))
    if weights is not None:
        values, names = weights
        ax = axes.pop(0)
        top = max(float(np.abs(values).max()), 1e-9)
        image = ax.imshow(values, cmap="RdBu", vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=ax)
        step = max(1, len(names) // 16)
        ax.set_yticks(range(0, len(names), step), names[::step], fontsize=6)
        ax.set(title="depth weights", xlabel="source (0: embedding)")
    layers = np.arange(found["layers"])
    for i, (branch, color) in enumerate((("attention", "tab:blue"), ("feed-forward", "tab:orange"))):
        column = lambda name, i=i: np.asarray(found[name])[:, i]
        axes[0].plot(layers, column("given_rms"), "o-", ms=3, color=color, label=f"{branch} gave")
        axes[0].plot(layers, column("read_rms"), "--", color=color, label=f"{branch} read")
        axes[1].plot(layers, column("cosine"), "o-", ms=3, color=color, label=branch)
    axes[0].set(title="root mean square", xlabel="layer", yscale="log")
    axes[1].set(title="cosine of what was read and read + gave", xlabel="layer")
    axes[2].plot(found["lens_loss"], "o-", ms=3, color="tab:green", label="loss, nats a token")
    twin = axes[2].twinx()
    twin.plot(found["lens_agrees"], "s--", ms=3, color="tab:red", label="agrees with the end")
    twin.set(ylim=(0, 1.02))
    for ax in axes[2:4]:
        for layer in found["exits_at"]:
            ax.axvline(layer, color="0.8", lw=1, zorder=0)
    twin.legend(loc="upper center", fontsize=7)
    axes[2].set(title="if the model ended here", xlabel="layers")
    for row in found["exits"]:
        label = f"{row['confidence']:g}: depth {row['depth']:.2f}, agrees {row['agrees']:.2f}"
        axes[3].plot(row["left"], "o-", ms=3, label=label)
    axes[3].set(title="tokens that would leave", xlabel="behind layer", ylabel="part")
    for ax in axes:
        ax.legend(fontsize=7)
    if title:
        figure.suptitle(title)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()


def write(path: Path, data: bytes) -> None:
    """By one rename, so that a viewer never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def table(found: dict) -> str:
    lines = [f"{'layer':>5} {'loss':>8} {'agrees':>7} {'attention':>22} {'feed-forward':>22}"]
    lines.append(f"{'':>5} {'so far':>8} {'':>7} {'gave / read':>13} {'cosine':>8} {'gave / read':>13} {'cosine':>8}")
    for i, (loss, agrees) in enumerate(zip(found["lens_loss"], found["lens_agrees"], strict=True)):
        mark = "*" if i in found["exits_at"] else " "
        line = f"{i:>4}{mark} {loss:8.4f} {agrees:7.3f}"
        if i:
            for b in range(2):
                gave, read, near = (found[name][i - 1][b] for name in ("given_rms", "read_rms", "cosine"))
                line += f" {gave:6.3g}/{read:6.3g} {near:8.3f}"
        lines.append(line)
    lines.append("* an exit: with its own head" if found["exits_at"] else "")
    lines.append("confidence   depth   of all FLOPs   agrees with the end   (simulated: nothing is left out here)")
    for row in found["exits"]:
        part = row["flops_per_token"] / found["flops_per_token"]
        lines.append(f"{row['confidence']:10g} {row['depth']:7.2f} {part:14.3f} {row['agrees']:21.3f}")
    return "\n".join(lines)
