"""Early exits as an option of the decoder: where a token may leave the stack, through which head, trained how. Free of JAX
at import."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpar.models.exits.heads import Adapter, OwnNorm, Shared
from jaxpar.models.exits.losses import Calm, Deed, EeLlm, Free, LayerSkip

ExitHead = Shared | OwnNorm | Adapter
ExitLoss = Calm | Deed | EeLlm | LayerSkip | Free


@dataclass(frozen=True)
class Exits:
    """Exits of the decoder. Without any (`at = ()`) model, parameters and compiled programs are those of the plain decoder.

    Attributes:
      at: behind how many layers the exits are, in rising order: (4, 8) leaves after the fourth layer and after the eighth.
        The last layer has the model's own head and is no exit.
      head: what stands between the stream and the output projection, which all exits share with the last layer.
      loss: how the losses of the exits and of the last layer are joined in training. Evaluation has the last layer's alone.
    """

    at: tuple[int, ...] = ()
    head: ExitHead = Shared()
    loss: ExitLoss = Calm()

    def check(self, cfg) -> None:
        """Raises ValueError where these exits do not suit the model."""
        if not self.at:
            return
        for layer in self.at:
            if not 1 <= layer < cfg.layers:
                why = "the last layer has a head of its own" if layer == cfg.layers else "there is no such layer"
                raise ValueError(
                    f"model.exits.at = {self.at}: an exit stands behind 1 to {cfg.layers - 1} of the model's {cfg.layers} "
                    f"layers, not behind {layer} ({why})"
                )
        if list(self.at) != sorted(set(self.at)):
            raise ValueError(
                f"model.exits.at = {self.at} must rise, each exit named once: {tuple(sorted(set(self.at)))}"
            )
        if cfg.residual.write_once:
            raise ValueError(
                f"model.residual = {type(cfg.residual).__name__} reads a source of every layer, and behind layer "
                f"{self.at[0]} those of {cfg.layers - self.at[0]} layers are missing; for exits take an operator whose state "
                "is whole behind every layer: Plain, HyperConnections, ManifoldHyperConnections, DeepDelta"
            )
        self.loss.check(self.at, cfg.layers)

    def check_route(self, route) -> None:
        """Raises ValueError where layers run in another order, or some not at all; they may be left out by chance."""
        if self.at and getattr(route, "reorders", False):
            raise ValueError(
                f"model.exits.at = {self.at} are places in the stack, and {route.name} runs other layers in other places; "
                "take layer-drop, stochastic-depth, progressive-layer-drop or layer-skip-dropout, or train without exits"
            )

    def check_paths(self, paths, stages: int) -> None:
        """Raises ValueError where microbatches leave stages out or take them in another order.

        Args:
          paths: the stages that each microbatch visits.
        """
        odd = [i for i, path in enumerate(paths) if list(path) != list(range(stages))]
        if self.at and odd:
            raise ValueError(
                f"model.exits.at = {self.at} are places in the stack, and in this schedule microbatch {odd[0]} visits stages "
                f"{tuple(paths[odd[0]])} of {stages}; take one where all visit each in order: gpipe, 1f1b, interleaved, zb-h1, "
                "zb-v, dualpipe-v"
            )

    def spec(self, cfg) -> dict:
        """Parameters of the exits' heads, by the layer they stand behind."""
        specs = {str(layer): self.head.spec(cfg) for layer in self.at}
        return {layer: spec for layer, spec in specs.items() if spec}

    def flops(self, cfg) -> int:
        """Forward matmul FLOPs for one token of all exits' heads, which training runs."""
        return len(self.at) * (2 * cfg.width * cfg.vocabulary + self.head.flops(cfg))

    def normed(self, cfg, head: dict, x_BxTxD, layer: int, matmul):
        """What the output projection sees behind `layer`.

        Args:
          head: `params["head"]`. Behind a layer that is no exit the last layer's norm is taken ("logit lens").
        """
        if layer in self.at:
            return self.head.normed(cfg, head, head.get("exits", {}).get(str(layer)), x_BxTxD, matmul)
        return cfg.norm(head["norm"], x_BxTxD)
