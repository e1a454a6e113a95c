"""Leaving parts of the model out in training: strategies behind one protocol (`base`), swapped by one option.

    LayerDrop             each layer of each microbatch by chance (Fan et al. 2019)
    StochasticDepth       later layers more often, and what stays is scaled (Huang et al. 2016)
    ProgressiveLayerDrop  more and more of them as training goes on (Zhang & He 2020)
    SkipPaths             a fixed path over stages for each microbatch (SkipPipe, Blagoev et al. 2025)
    SwapEnds              all stages, for every second microbatch with both ends swapped (CheckFree+)

`transform` puts a strategy into a step. What is skipped is not computed: a layer that chance leaves out stands behind a
branch, one that a path leaves out is not in the program. Evaluation runs the whole model in order. (Leaving out whole steps
is `jaxpar.steps.spikes`.)
"""
