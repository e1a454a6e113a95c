"""The text that a run generates from its own model at its end."""

from __future__ import annotations

import jax
from jax.experimental import multihost_utils

from jaxpar.generation import generate
from jaxpar.run import Run, first_ids

FILE = "sample.txt"


def sample(run: Run) -> str:
    """The prompt and its continuation; also written to `sample.txt` and TensorBoard. Empty where none is asked for."""
    config = run.config.sample
    if config.tokens == 0:
        return ""
    tokenizer = run.pipeline.tokenizer
    prompt = first_ids(tokenizer, config.prompt)
    # Sharded parameters are gathered once: generation runs one row, on one device of each process.
    params = (
        multihost_utils.process_allgather(run.best_params(), tiled=True)
        if jax.process_count() > 1
        else (jax.device_put(run.best_params(), jax.local_devices()[0]))
    )
    [row] = generate(
        run.program.cfg,
        params,
        [prompt],
        new_tokens=config.tokens,
        sampler=config.sampler,
        stop=[tokenizer.eod],
        key=jax.random.key(run.config.seed),
        vocabulary=tokenizer.size,
    )
    text = config.prompt + tokenizer.decode(row)
    if jax.process_index() == 0:
        (run.folder / FILE).write_text(text, encoding="utf-8")
        run.writers.text(run.step, "sample", text)
    return text
