"""Gradient accumulation: a batch in microbatches, one after the other."""

from __future__ import annotations

from dataclasses import replace

from jaxpar.errors import UserError
from jaxpar.microbatches import dealt, summed
from jaxpar.step import Batch, Control, Gradients, Step, StepTransform, TrainState


def accumulate(microbatches: int) -> StepTransform:
    """Run the batch's rows in `microbatches` parts and add up their gradients.

    Gradients are sums over tokens and are divided once, by the sum of all loss weights: microbatches with unequal
    numbers of tokens count by their tokens, and the result is the whole batch's (up to the order of float32 sums).

    Raises:
      UserError: fewer than one microbatch; when traced, rows that they do not divide.
    """
    if microbatches < 1:
        raise UserError(f"accumulate needs at least 1 microbatch, got {microbatches}")

    def transform(step: Step) -> Step:
        if microbatches == 1:
            return step

        def gradients(state: TrainState, batch: Batch, control: Control | None) -> Gradients:
            rows = batch.tokens.shape[0]
            if rows % microbatches:
                raise UserError(
                    f"{rows} rows are not divisible into {microbatches} microbatches; choose a batch of "
                    f"{rows - rows % microbatches or microbatches} or {rows + microbatches - rows % microbatches} rows"
                )
            control = Control() if control is None else control

            def one(part):
                batch, weights = part
                return step.gradients(state, batch, control.replace(sample_weights=weights))

            return summed(one, dealt((batch, control.sample_weights), microbatches))

        return replace(step, gradients=gradients)

    return transform
