"""Leaving out the feed-forward part of layers, or whole layers, token by token, of any model as it was trained.

FFN-SkipLLM (Jaiswal et al. 2024) leaves out feed-forward layers only: keys and values of every token are there in every
layer, and the cache has no holes. A feed-forward layer is redundant where the stream behind it points where the stream before
it did: cos(x, x + FFN(norm(x))), after the residual add (the bare output of the layer says nothing of the kind). The cosine
is known once the layer has run, so what is saved are the layers *behind* a redundant one. Never left out are the first and
last layers, whose cosines are low, and all of the first tokens, which the rest attends to.

`RandomSkip` and `FixedSkip` are the controls: by chance and always the same ones; the feed-forward part, or whole layers,
which leaves holes in the cache. Remedies for these (`keys`):

    propagate   keys and values of the layer are made from the stream as it is, which is not what the layer would have seen
                (CALM, Schuster et al. 2022)
    mask        there are none, and later tokens do not see this token in this layer

A decision looks at one token and its stream alone, so a text given at once is what it is token by token, and a row what it is
alone. Work is saved where no token of the pass needs a part (`jax.lax.cond`): with one row, every time. With `simulate` all
parts run and results are chosen: the same tokens, no saving. Free of JAX at import.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxpar.models.lazy import jax, jnp

Site = Literal["feedforward", "layer"]
Keys = Literal["propagate", "mask"]


@dataclass(frozen=True)
class FFNSkip:
    """Feed-forward layers behind one that hardly turned the stream are left out (Jaiswal et al. 2024, §3).

    The paper's body gives neither its thresholds nor its cold regions by model: `experiments.adaptive.ffn_skipping` shows a
    model's cosines, by which to choose them.

    Attributes:
      threshold: the cosine from which on a feed-forward layer counts as redundant. Above 1 never.
      run: how many feed-forward layers are left out behind it, before one runs and is looked at again.
      first: layers at the start that always run whole.
      last: layers at the end that always run whole.
      warmup: tokens behind the prompt for which every layer runs whole (the paper: 5 to 10 % of the text).
      simulate: run every part and choose among results: the same tokens, and nothing saved.
    """

    threshold: float = 0.97
    run: int = 2
    first: int = 1
    last: int = 1
    warmup: int = 4
    simulate: bool = False
    site: ClassVar[Site] = "feedforward"
    keys: ClassVar[Keys] = "propagate"

    def __post_init__(self):
        if not -1 <= self.threshold <= 1:
            raise ValueError(
                f"skip.threshold = {self.threshold} is no cosine; choose one from -1 to 1, for example 0.97"
            )
        if self.run < 1:
            raise ValueError(f"skip.run = {self.run} layers must be at least 1")
        common(self)

    def decide(self, record, layer, positions_BxT):
        """bool [B, T]: who leaves this layer's part out."""
        return record.remaining > 0

    def remaining(self, record, skip_BxT, may_BxT, cosine_BxT):
        """int32 [B, T]: how many layers are left out next."""
        found = jnp.where(may_BxT & (cosine_BxT >= self.threshold), self.run, 0)
        return jnp.where(skip_BxT, record.remaining - 1, found)


@dataclass(frozen=True)
class RandomSkip:
    """Each token leaves out each layer's part by chance: a control.

    Attributes:
      share: the probability.
      site: what is left out: the feed-forward part, or the whole layer.
      keys: where the whole layer is, what of its keys and values: made from the stream as it is, or masked.
      first: layers at the start that always run whole.
      last: layers at the end that always run whole.
      warmup: tokens behind the prompt for which every layer runs whole.
      seed: of the draws, which fold in layer and position.
      simulate: run every part and choose among results.
    """

    share: float = 0.25
    site: Site = "feedforward"
    keys: Keys = "propagate"
    first: int = 1
    last: int = 1
    warmup: int = 4
    seed: int = 0
    simulate: bool = False

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"skip.share = {self.share} is no probability; choose one from 0 to 1")
        common(self)

    def decide(self, record, layer, positions_BxT):
        key = jax.random.fold_in(jax.random.key(self.seed), layer)
        one = lambda position: jax.random.bernoulli(jax.random.fold_in(key, position), self.share)
        return jax.vmap(jax.vmap(one))(positions_BxT)

    def remaining(self, record, skip_BxT, may_BxT, cosine_BxT):
        return record.remaining


@dataclass(frozen=True)
class FixedSkip:
    """Every token leaves out the same layers: the last ones before those that always run. A control.

    Attributes:
      layers: how many.
      site: what is left out: the feed-forward part, or the whole layer.
      keys: where the whole layer is, what of its keys and values: made from the stream as it is, or masked.
      first: layers at the start that always run whole.
      last: layers at the end that always run whole.
      warmup: tokens behind the prompt for which every layer runs whole.
      simulate: run every part and choose among results.
    """

    layers: int = 1
    site: Site = "feedforward"
    keys: Keys = "propagate"
    first: int = 1
    last: int = 1
    warmup: int = 4
    simulate: bool = False

    def __post_init__(self):
        if self.layers < 1:
            raise ValueError(f"skip.layers = {self.layers} must be at least 1; without skipping, leave --skip out")
        common(self)

    def decide(self, record, layer, positions_BxT):
        depth = record.cosines.shape[0]
        return jnp.broadcast_to(layer >= depth - self.last - self.layers, positions_BxT.shape)

    def remaining(self, record, skip_BxT, may_BxT, cosine_BxT):
        return record.remaining


Skipping = FFNSkip | RandomSkip | FixedSkip


def common(policy) -> None:
    for name in ("first", "last", "warmup"):
        if getattr(policy, name) < 0:
            raise ValueError(f"skip.{name} = {getattr(policy, name)} must be at least 0")


def check(policy: Skipping, cfg) -> None:
    """Raises ValueError where this model has nothing to leave out, or no stream to compare."""
    from jaxpar.models.residual.plain import Plain

    free = cfg.layers - policy.first - policy.last
    # One to look at and one to leave out behind it.
    wanted = policy.layers if isinstance(policy, FixedSkip) else 2 if isinstance(policy, FFNSkip) else 1
    if free < wanted:
        raise ValueError(
            f"skip.first = {policy.first} and skip.last = {policy.last} of the model's {cfg.layers} layers always run, which "
            f"leaves {max(free, 0)} where this takes {wanted} at least; lower them"
        )
    if cfg.depth.sparse:
        raise ValueError(
            f"model.depth = {type(cfg.depth).__name__} says itself which tokens pass a layer by; generate without --skip"
        )
    if not isinstance(cfg.residual, Plain):
        raise ValueError(
            f"a part of a layer is left out where the stream stays as it is, but model.residual = "
            f"{type(cfg.residual).__name__} keeps more than one stream or reads earlier tokens'; only Plain can be skipped"
        )


def around(cfg, ctx, state, pages, layer, positions_BxT, attend, transform, keys_only) -> tuple[Any, Any]:
    """A layer of which tokens leave parts out.

    Args:
      state: the stream [B, T, D].
      positions_BxT: of the tokens, for draws.
      attend: (ctx, state, pages) -> the two behind attention.
      transform: (state) -> the stream behind the feed-forward part, and more.
      keys_only: (ctx, state, pages) -> the pages with these tokens' keys and values, and nothing else done.

    Returns:
      state, pages.
    """
    from jaxpar.models.routing.record import cosine

    policy, record = ctx.skip.policy, pages.record
    may = ctx.skip.may(cfg, layer, positions_BxT.shape)
    skip = may & policy.decide(record, layer, positions_BxT)
    needed = ~skip.all()
    pages = pages.replace(record=None)
    if policy.site == "feedforward":
        before, pages = attend(ctx, state, pages)
        run = lambda x: transform(x)[0]
        after = run(before) if policy.simulate else jax.lax.cond(needed, run, lambda x: x, before)
    else:
        before = state
        if policy.keys == "mask":
            ctx = ctx.replace(present=~skip)

        def whole(state, pages):
            state, pages = attend(ctx, state, pages)
            return transform(state)[0], pages

        without = lambda state, pages: (state, keys_only(ctx, state, pages))
        after, pages = whole(state, pages) if policy.simulate else jax.lax.cond(needed, whole, without, state, pages)
    cosines = jnp.where(skip, jnp.nan, cosine(before, after))
    record = record.replace(
        remaining=policy.remaining(record, skip, may, cosines),
        skipped=record.skipped + skip,
        spared=record.spared + (0 if policy.simulate else ~needed),
        cosines=jax.lax.dynamic_update_index_in_dim(record.cosines, cosines, layer, 0),
    )
    return jnp.where(skip[..., None], before, after), pages.replace(record=record)
