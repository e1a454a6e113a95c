"""Two feed-forward modules in every layer, a big and a small one, and a choice between them for every token.

Duo-LLM (Alizadeh et al. 2024). Attention is shared, so keys and values are there whatever is chosen, and a cache has no holes.

Stage 1 (`routing = "random"`) trains both modules from the start, a choice by chance for each token in each layer: then every
one of the 2^L routes is a model. Stage 3 (`routing = "learned"`) adds a router to each layer, a linear map of what the
modules see, P = softmax(W x / temperature), and trains on Σ_m P_m · module_m(x) with

    loss = cross-entropy + strength · (mean over tokens and layers of P_big - budget)²        for each row

The paper gives neither the strength nor the temperatures; it says that the temperature rises "to enforce hard assignment", which
holds for its inverse. Here it is the divisor, and outside of training the choice is the argmax. Stage 2, the oracle, stands in
`jaxpar.models.routing.oracle`.

Both modules are computed in training, and one result is chosen: static shapes, and nothing saved. In decoding a module that no
token of the pass needs does not run (`jax.lax.cond`); with one row that is a true saving.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

from jaxpar.models.feedforward.base import FeedForwardLayer
from jaxpar.models.feedforward.dense import MLP, GatedMLP
from jaxpar.models.lazy import jax, jnp
from jaxpar.models.spec import Normal, ParamSpec

SMALL, BIG, SKIP = 0, 1, 2
"""The modules by number, as `Context.modules` names them."""
SITE = 3
"""What the random choice folds in; dropout has 0 to 2."""


class Tally(NamedTuple):
    """Counted over layers where routers choose. Where a row's tokens lie over devices, each counts its own.

    Attributes:
      big: float32 [B], the sum over layers and a row's tokens of P_big (outside of training, of those with big modules).
      tokens: float32 [B], over how many that is.
    """

    big: Any
    tokens: Any

    def plus(self, big_BxS, ctx) -> Tally:
        """With a layer more. Padding does not count."""
        real_BxS = jnp.ones(big_BxS.shape, bool) if ctx.segments is None else ctx.ops.shards.own(ctx.segments) > 0
        return Tally(self.big + jnp.sum(big_BxS * real_BxS, -1), self.tokens + jnp.sum(real_BxS, -1))


@dataclass(frozen=True)
class Duo(FeedForwardLayer):
    """A big and a small feed-forward module in every layer (Alizadeh et al. 2024).

    Attributes:
      small: the hidden size of the small module as a share of `model.hidden` (the paper: 1/16 of the big one).
      module: what both modules are.
      routing: who chooses in training: chance, or a router. Outside of training chance becomes the big module.
      big: the probability with which chance takes the big module.
      skip: the probability with which chance takes neither. Above 0 routers may too.
      budget: the share of big modules that routers are trained to.
      strength: of the budget's part of the loss.
      temperature: divides the routers' logits in training.
    """

    small: float = 1 / 16
    module: GatedMLP | MLP = GatedMLP()
    routing: Literal["random", "learned"] = "random"
    big: float = 0.5
    skip: float = 0.0
    budget: float = 0.5
    strength: float = 1.0
    temperature: float = 1.0
    routed: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("big", "skip", "budget"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"feedforward.{name} = {getattr(self, name)} is outside 0 to 1; it is a share")
        if self.big + self.skip > 1:
            raise ValueError(
                f"feedforward.big = {self.big} and feedforward.skip = {self.skip} are probabilities of two of three choices, "
                f"but together {self.big + self.skip}; lower one"
            )
        if not 0 < self.small <= 1:
            raise ValueError(f"feedforward.small = {self.small} of the hidden size must be above 0 and at most 1")
        if self.temperature <= 0 or self.strength < 0:
            raise ValueError(
                f"feedforward.temperature = {self.temperature} must be above 0, and feedforward.strength = {self.strength} "
                "at least 0"
            )

    def hidden(self, cfg) -> int:
        """The small module's hidden size."""
        return round(cfg.hidden * self.small)

    @property
    def choices(self) -> int:
        return 3 if self.skip > 0 else 2

    def check(self, cfg) -> None:
        if self.hidden(cfg) < 1:
            raise ValueError(
                f"feedforward.small = {self.small} of model.hidden = {cfg.hidden} leaves a small module of "
                f"{self.hidden(cfg)} units; choose at least {1 / cfg.hidden:.4g}"
            )

    def spec(self, cfg) -> dict:
        specs = {"big": self.module.spec(cfg), "small": self.module.spec(self._small(cfg))}
        if self.routing == "learned":
            shape = (cfg.width, self.choices)
            specs["router"] = ParamSpec(shape, ("embed", None), Normal(cfg.init_std))
        return specs

    def _small(self, cfg):
        return replace(cfg, hidden=self.hidden(cfg), feedforward=self.module)

    def flops(self, cfg) -> int:
        """Both modules, as training runs them."""
        router = 2 * cfg.width * self.choices if self.routing == "learned" else 0
        return router + self.module.flops(cfg) + self.module.flops(self._small(cfg))

    def flops_of(self, cfg) -> tuple[int, int, int]:
        """For one token of one layer, by the module that it takes."""
        return self.module.flops(self._small(cfg)), self.module.flops(cfg), 0

    def tally(self, cfg, ctx, rows):
        if self.routing != "learned" or ctx.modules is not None:
            return None
        return Tally(jnp.zeros(rows, jnp.float32), jnp.zeros(rows, jnp.float32))

    def penalty(self, cfg, tally, ctx, weights_BxT):
        """Each row's budget loss, times the row's loss weight, so that it is a mean over tokens as the cross-entropy is."""
        big_B, tokens_B = ctx.ops.whole_row(tuple(tally))
        off_B = big_B / jnp.maximum(tokens_B, 1) - self.budget
        # The weights of the tokens at hand: devices with others of the same row add theirs.
        weights_B = ctx.ops.shards.own(weights_BxT).astype(jnp.float32).sum(-1)
        return self.strength * jnp.sum(jnp.square(off_B) * weights_B)

    def routed_apply(self, cfg, params: dict, x_BxSxD, ctx, layer, tally):
        """[B, S, D] -> [B, S, D] and the tally."""
        run = {
            SMALL: lambda x: self.module.apply(self._small(cfg), params["small"], x, ctx.ops),
            BIG: lambda x: self.module.apply(cfg, params["big"], x, ctx.ops),
            SKIP: jnp.zeros_like,
        }
        if tally is not None and ctx.key is not None:
            p_BxSxM = jax.nn.softmax(self.logits(params, x_BxSxD) / self.temperature)
            y = sum(p_BxSxM[..., m, None].astype(x_BxSxD.dtype) * run[m](x_BxSxD) for m in (SMALL, BIG))
            return y, tally.plus(p_BxSxM[..., BIG], ctx)
        choice = self.choose(cfg, params, x_BxSxD, ctx, layer)
        tally = None if tally is None else tally.plus(choice == BIG, ctx)
        if isinstance(choice, int):
            return run[choice](x_BxSxD), tally
        if choice.ndim == 0:  # the same for all tokens: a branch
            return jax.lax.switch(choice, [run[m] for m in (SMALL, BIG, SKIP)], x_BxSxD), tally
        wanted = {m: (choice == m)[..., None] for m in (SMALL, BIG)}
        if ctx.cache is None:
            results = {m: run[m](x_BxSxD) for m in wanted}
        else:
            results = {m: jax.lax.cond(w.any(), run[m], jnp.zeros_like, x_BxSxD) for m, w in wanted.items()}
        return sum(jnp.where(wanted[m], y, 0) for m, y in results.items()), tally

    def logits(self, params: dict, x_BxSxD):
        """The router's, float32 [B, S, M]."""
        return jnp.einsum("bsd,dm->bsm", x_BxSxD.astype(jnp.float32), params["router"].astype(jnp.float32))

    def choose(self, cfg, params: dict, x_BxSxD, ctx, layer):
        """The number of each token's module: int32 [B, S]; where it is the same for all, [] or an int."""
        from jaxpar.models.context import token_keys

        if ctx.modules is not None:
            choice = ctx.modules[layer]
            return choice if choice.ndim == 0 else ctx.ops.shards.own(choice)
        if self.routing == "learned":
            return jnp.argmax(self.logits(params, x_BxSxD), axis=-1)
        if ctx.key is None:
            return BIG
        u_BxS = jax.vmap(jax.vmap(jax.random.uniform))(token_keys(ctx, x_BxSxD.shape[1], layer, SITE))
        return jnp.where(u_BxS < self.big, BIG, jnp.where(u_BxS < self.big + self.skip, SKIP, SMALL))


def with_routers(cfg, params: dict, key, **options):
    """A model of stage 1 with untrained routers: the configuration and the parameters of stage 3.

    Args:
      options: other fields of `Duo`: budget, strength, temperature.
    """
    from jaxpar.models import decoder, spec

    cfg = replace(cfg, feedforward=replace(cfg.feedforward, routing="learned", **options))
    fresh = spec.init(decoder.spec(cfg), key)["layers"]["feedforward"]["router"]
    layers = {**params["layers"], "feedforward": {**params["layers"]["feedforward"], "router": fresh}}
    return cfg, {**params, "layers": layers}
