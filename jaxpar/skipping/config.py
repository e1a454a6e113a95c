"""The skipping strategies that a run can choose from. Free of JAX at import."""

from jaxpar.skipping.chance import LayerDrop, ProgressiveLayerDrop, StochasticDepth
from jaxpar.skipping.layer_skip import LayerSkipDropout
from jaxpar.skipping.paths import SkipPaths, SwapEnds

AnySkipping = LayerDrop | StochasticDepth | ProgressiveLayerDrop | LayerSkipDropout | SkipPaths | SwapEnds
