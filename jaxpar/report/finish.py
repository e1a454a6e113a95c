"""What a finished run tells: its loss beside the baseline, its sample, where things are, and what to try next."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax

from jaxpar.presets import DEFAULT, PRESETS

if TYPE_CHECKING:
    from jaxpar.config import RunConfig
    from jaxpar.run import Run

RULE = "-" * 80


def tell(run: Run, loss: float, sample: str, say: Callable[[str], None] = print) -> None:
    """Print it, on the first process."""
    if jax.process_index() == 0:
        say("\n".join(lines(run, loss, sample)))


def same(config: RunConfig) -> str:
    """The command that goes on with a run of this configuration, but for `--steps`."""
    for name, preset in PRESETS.items():
        plain = preset()
        model = plain.model.replace(vocabulary=config.model.vocabulary)
        if plain.replace(model=model, steps=config.steps, folder=config.folder) == config:
            where = "" if plain.folder == config.folder else f" --folder {config.folder}"
            return f"jaxpar train{'' if name == DEFAULT else f' {name}'}{where}"
    return "the same command with"


def lines(run: Run, loss: float, sample: str) -> list[str]:
    found = [""]
    if sample:
        found += [RULE, sample, RULE, ""]
    found.append(f"held-out loss {loss:.4f} nats per token after {run.step} steps")
    if run.baseline is not None:
        verdict = "below" if loss < run.baseline else "NOT below"
        found.append(f"bigram model  {run.baseline:.4f} on the same tokens: the model is {verdict} it")
    folder = run.folder
    found += [
        f"loss curve, metrics, TensorBoard files, checkpoints: {folder}/",
        "",
        "next:",
        f"  jaxpar generate --model {folder} --prompt 'import ' --tokens 200 --temperature 0.7",
        f"  {same(run.config)} --steps {2 * run.config.steps}          # the same run, twice as long",
        "  jaxpar train --fake-devices 8 --mesh data=2,fsdp=2,tensor=2 --folder runs/mesh",
        "  jaxpar explain --fake-devices 8 --mesh data=2,fsdp=2,tensor=2",
        f"  tensorboard --logdir {folder.parent}",
    ]
    return found
