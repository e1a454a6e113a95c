"""Which tokens run in a layer: all of them, or those that a router picks (mixture of depths). Free of JAX at import.

Mixture-of-Depths (Raposo et al. 2024): in each second layer a router, r = w·x, picks a share of each row's tokens, the highest;
x' = x + sigmoid(r) · layer(x) for these and x' = x for the others. (The paper multiplies by r itself; the bare value blows up.)
Tokens that are not picked have no keys and values in the layer: picked tokens attend to picked ones alone, and in a cache the others
are masked, for a key of zeros would still take its share of the softmax.

Picking the highest of a row looks at tokens to come. So a second head, a small perceptron on the stream with its gradient stopped, learns
to tell from a token alone whether it is among them (binary cross-entropy), and *outside of training it picks*: held-out loss and
generation see nothing of the future. Its loss does not move the rest of the model, nor is it part of the reported loss: its
gradient is put in where the layer is (`with_loss`), so that it needs no way out of a loop or a pipeline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxpar.models.lazy import jax, jnp
from jaxpar.models.spec import Constant, Normal, ParamSpec


@dataclass(frozen=True)
class EveryToken:
    """All tokens run in every layer."""

    sparse: ClassVar[bool] = False

    def check(self, cfg) -> None:
        pass

    def check_spread(self, sequence: int, permuted: bool) -> None:
        pass

    def spec(self, cfg) -> dict:
        return {}

    def size(self, layer: int, tokens: int) -> int:
        """How many of a row's tokens run in a layer."""
        return tokens

    def present(self, params: dict, x_BxTxD, layer) -> Any:
        """bool [B, T], which tokens have keys and values in a layer outside of training, by what enters it; None: all."""
        return None


@dataclass(frozen=True)
class MixtureOfDepths:
    """Some layers run for the tokens alone that a router picks (Raposo et al. 2024).

    Attributes:
      capacity: the share of a row's tokens that a routed layer has in training, rounded up.
      every: how many layers to a routed one, the last of them: 2 routes each second layer.
      predictor: hidden units of the head that picks outside of training.
    """

    capacity: float = 0.125
    every: int = 2
    predictor: int = 32
    sparse: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 < self.capacity <= 1:
            raise ValueError(f"depth.capacity = {self.capacity} of a row's tokens must be above 0 and at most 1")
        if self.every < 1 or self.predictor < 1:
            raise ValueError(f"depth.every = {self.every} and depth.predictor = {self.predictor} must be at least 1")

    def check(self, cfg) -> None:
        from jaxpar.models.residual.plain import Plain

        if self.every > cfg.layers:
            raise ValueError(
                f"depth.every = {self.every} routes one layer of {self.every}, but the model has {cfg.layers}: none is routed"
            )
        if not isinstance(cfg.residual, Plain):
            raise ValueError(
                f"tokens pass a layer by where the stream stays as it is, but model.residual = "
                f"{type(cfg.residual).__name__} keeps more than one stream or reads earlier tokens'; only Plain can be combined "
                "with mixture of depths"
            )
        if cfg.dropout:
            raise ValueError(
                f"model.dropout = {cfg.dropout} draws for whole rows of tokens, and a routed layer has some of them; set it to 0"
            )
        if getattr(cfg.feedforward, "routed", False):
            raise ValueError(
                f"model.feedforward = {type(cfg.feedforward).__name__} routes whole rows of tokens, and a routed layer has some "
                "of them; take one of the two"
            )

    def check_spread(self, sequence: int, permuted: bool) -> None:
        """Raises ValueError where picked tokens cannot run among themselves.

        Args:
          sequence: devices that the tokens of a row lie on, as attention wants them.
          permuted: whether products send tokens round in rings.
        """
        if sequence > 1:
            raise ValueError(
                f"mixture of depths picks some of a row's tokens, and attention over tokens that lie on {sequence} devices knows "
                "where those of whole rows lie, not where picked ones do; train on a mesh with sequence=1 (data, stage, fsdp "
                "and tensor are free)"
            )
        if permuted:
            raise ValueError(
                "tensor.products = 'ring' permutes, which no branch may hold that devices take differently, and mixture of depths "
                "branches on the layer and on whom it picks; take tensor.products = 'gathered', 'weave', 'sharded' or 'whole'"
            )

    def spec(self, cfg) -> dict:
        D, H = cfg.width, self.predictor
        return {
            "depth": {
                "router": ParamSpec((D,), ("embed",), Normal(cfg.init_std)),
                "up": ParamSpec((D, H), ("embed", None), Normal(D**-0.5)),
                "down": ParamSpec((H,), (None,), Normal(H**-0.5)),
                "bias": ParamSpec((), (), Constant(0.0), decay=False),
            }
        }

    def routed(self, layer):
        """Whether a layer, which may be traced, is."""
        return layer % self.every == self.every - 1

    def size(self, layer: int, tokens: int) -> int:
        return math.ceil(self.capacity * tokens) if self.routed(layer) else tokens

    def present(self, params: dict, x_BxTxD, layer) -> Any:
        return (self.predict(params["depth"], x_BxTxD) > 0) | ~jnp.asarray(self.routed(layer))

    def around(self, cfg, params: dict, x_BxTxD, pages, ctx, tables, layer, i, run) -> tuple[Any, Any]:
        """A layer: routed or not.

        Args:
          params: the layer's.
          run: (x, pages, ctx, tables) -> x, pages: the layer itself.
        """
        own = params["depth"]
        picked = self.picked if ctx.cache is None and ctx.key is not None else self.predicted
        sparse = lambda x, pages: picked(cfg, own, x, pages, ctx, tables, i, run)
        whole = lambda x, pages: run(x, pages, ctx, tables)
        if not hasattr(layer, "aval"):
            return sparse(x_BxTxD, pages) if self.routed(int(layer)) else whole(x_BxTxD, pages)
        return jax.lax.cond(self.routed(layer), sparse, whole, x_BxTxD, pages)

    def picked(self, cfg, own, x_BxSxD, pages, ctx, tables, i, run):
        """In training: the highest of each row, gathered, so that the others cost nothing.

        Where the stream's S of T tokens lie over devices, each has the whole row's scores and runs its share of the picked tokens:
        the row is gathered once to pick from, and what is added to it is summed into each device's own. Where the K picked do not
        divide over the devices, the next highest run along, seen by nobody.
        """
        shards, B = ctx.ops.shards, x_BxSxD.shape[0]
        r_BxT = shards.gather(score(own["router"], x_BxSxD))
        T = r_BxT.shape[1]
        real_BxT = jnp.ones((B, T), bool) if ctx.segments is None else ctx.segments > 0
        size = math.ceil(self.capacity * T)
        run_along = -size % shards.shards
        _, at = jax.lax.top_k(jnp.where(real_BxT, r_BxT, -jnp.inf), size + run_along)
        order_BxK = jnp.argsort(at, axis=-1)
        at_BxK, picked_BxK = jnp.take_along_axis(at, order_BxK, axis=1), order_BxK < size
        take = lambda a: None if a is None else jnp.take_along_axis(a, at_BxK, axis=1)
        turn = lambda kinds: jax.tree.map(lambda a: jnp.take_along_axis(a, at_BxK[:, :, None, None], axis=1), kinds)
        some = ctx.replace(positions=take(ctx.positions), segments=take(ctx.segments))
        some = some.replace(present=picked_BxK if run_along else None)
        inner = tables.replace(
            cos=turn(tables.cos), sin=turn(tables.sin), positions=take(tables.positions), index=at_BxK
        )
        own_at, r, counts = shards.own((at_BxK, take(r_BxT), picked_BxK))
        x = jnp.take_along_axis(shards.gather(x_BxSxD), own_at[..., None], axis=1)
        new, pages = run(x, pages, some, inner)
        gate = jnp.where(counts, jax.nn.sigmoid(r), 0)[..., None]
        added, rows = (gate * (new - x)).astype(x.dtype), jnp.arange(B)[:, None]
        add = lambda to: to.at[rows, own_at].add(added, unique_indices=True, indices_are_sorted=True)
        if shards.shards == 1:
            x_new = add(x_BxSxD)
        else:
            x_new = x_BxSxD + shards.scatter(add(jnp.zeros((B, T, x.shape[-1]), x.dtype)))
        there = jnp.zeros((B, T), bool).at[rows, at_BxK].set(picked_BxK, unique_indices=True)
        return with_loss(x_new, self.loss(own, x_BxSxD, *shards.own((there & real_BxT, real_BxT)))), pages

    def loss(self, own, x_BxTxD, there_BxT, real_BxT):
        """The predictor's binary cross-entropy, summed over tokens."""
        z = self.predict(own, x_BxTxD)
        return jnp.sum(real_BxT * (jax.nn.softplus(z) - jnp.where(there_BxT, z, 0)))

    def predict(self, own, x_BxTxD):
        """The predictor's logit for each token, float32 [B, T]."""
        x = jax.lax.stop_gradient(x_BxTxD).astype(jnp.float32)
        h = jax.nn.gelu(jnp.einsum("btd,dh->bth", x, own["up"].astype(jnp.float32)))
        return score(own["down"], h) + own["bias"].astype(jnp.float32)

    def predicted(self, cfg, own, x_BxSxD, pages, ctx, tables, i, run):
        """Outside of training: whom the predictor picks. Where it picks nobody, the layer does not run."""
        from jaxpar.models import cache as kv

        shards = ctx.ops.shards
        go_BxT = shards.gather(self.predict(own, x_BxSxD)) > 0
        gate = jax.nn.sigmoid(score(own["router"], x_BxSxD))[..., None]

        def layer(x, pages):
            new, pages = run(x, pages, ctx.replace(present=go_BxT), tables)
            return jnp.where(shards.own(go_BxT)[..., None], x + (gate * (new - x)).astype(x.dtype), x), pages

        def nobody(x, pages):
            if pages is None or pages.there is None:
                return x, pages
            return x, pages.replace(there=kv.write(pages.there, go_BxT, i, tables.slots))

        return jax.lax.cond(go_BxT.any(), layer, nobody, x_BxSxD, pages)


def score(w_D, x_BxTxD):
    """`x · w` in float32: [B, T]."""
    return jnp.einsum("btd,d->bt", x_BxTxD.astype(jnp.float32), w_D.astype(jnp.float32))


def with_loss(x, loss):
    """x, through which the gradient of `loss` enters as if it was added to the sum that is differentiated."""
    return _with_loss()(x, loss)


def _with_loss():
    @jax.custom_vjp
    def same(x, loss):
        return x

    same.defvjp(lambda x, loss: (x, loss), lambda loss, g: (g, jnp.ones_like(loss)))
    return same
