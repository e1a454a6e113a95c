"""Transforms of a training step (`jaxpar.step`), and the laws that each of them keeps.

1. Where its trigger never fires it changes nothing: the arithmetic of the step is the same, operation by operation.
   (Which products and sums XLA fuses into one rounding depends on what is around them: compiled with fusion, a step may
   differ by the last bit from the bare one on a CPU. The same step on the same mesh is always bitwise itself.)
2. It is safe under `jit` and donation. 3. Its state is in checkpoints and goes to any mesh. 4. It never waits for the
   host. 5. It adds metrics under its own name, `<name>/...`, and removes none.
6. The order of a chain changes neither the slots nor a checkpoint's layout. It may change what happens:

Pairs whose order matters. `chain(step, a, b)`: b is outside, sees gradients first and has the last word on the state.

    clip_global / clip_per_stage         the outer clips first; the inner sees what is left
    clip_global / skip_spikes            inside a clip no norm stands out any more
    clip_per_stage / skip_spikes         inside a clip no norm stands out any more
    stop_on_nonfinite / skip_nonfinite   skipping outside takes back the stop as well: the run goes on
    stop_on_nonfinite / skip_spikes      spikes outside count on in a state that has stopped
    skip_nonfinite / skip_spikes         spikes outside skip an infinite value before it is counted as not finite
    clip_global / recovery               inside a clip CheckFree sees the norms that the clip left
    clip_per_stage / recovery            inside a clip CheckFree sees the norms that the clip left

All other pairs commute. (A recovery strategy that keeps copies refuses to stand inside of what it must copy.)
`StepConfig.transforms` has them in the order in which they work.
"""
