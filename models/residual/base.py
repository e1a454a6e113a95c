"""The residual stream as an operator over depth: what every mixer is asked, and the two types of those that keep sources.

A decoder's branch (attention or feed-forward) reads one input, and what it gives is written back. Plainly the stream is one
vector a token; a mixer may keep several, or every layer's, and combine them in its own way. Nearly all mixers here look at
one token at a time: nothing of them is kept from one decoding step to the next, and keys and values, which are made
from mixed inputs, stay right. A mixer that looks at earlier tokens' streams too says how far (`reach`), and is given them
(`Behind`); the cache keeps what they ask for, see `jaxpar.models.reach`.

What a mixer keeps says its type:

    DepthMixer    a state of fixed size, rewritten by every branch (plain, hyper-connections, delta rule)
    Deltas        sources are what layers or branches *gave*, the embedding first: their plain sum is the stream
    Cumulative    sources are the *states* behind each layer, the embedding first: the newest is the stream

Softmax reads over the second kind where the first is meant collapse (every state holds all before it), so the base
classes write, and a mixer of one type cannot store the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from jaxpar.models.lazy import jax, jnp

Tree = Any
Site = Literal["attention", "feedforward"]


class Streams(NamedTuple):
    """Inputs of attention's three projections, where they differ: each [B, T, D].

    Attributes:
      norms: parameters of the norms of key and value. None: all three have the branch's.
    """

    query: Any
    key: Any
    value: Any
    norms: tuple | None = None


class Behind(NamedTuple):
    """Earlier tokens, for a mixer whose reach is n + 1 tokens. S consecutive tokens at hand, the n before them in front.

    Attributes:
      values: what the mixer kept of them (`DepthMixer.kept`), a pytree of [B, n + S, ...]; zero where there is no token.
      documents: int32 [B, n + S], which document of its row a token belongs to; -1 where there is no token.
    """

    values: Any
    documents: Any


@dataclass(frozen=True)
class DepthMixer:
    """The interface. `state` is a pytree whose shapes do not depend on the layer: it is carried through the loop over
    layers and across pipeline boundaries. `params` are this layer's own entries, sliced from the stack; `layer` may be
    traced.

    Attributes:
      sources: what the mixer combines (static).
      write_once: whether the state holds a buffer with a slot for each source, see `jaxpar.models.residual.write_once`.
    """

    sources: ClassVar[Literal["state", "deltas", "cumulative"]] = "state"
    write_once: ClassVar[bool] = False

    def check(self, cfg) -> None:
        """Raises ValueError where this mixer cannot be combined with the model; `cfg` has its derived sizes."""

    def check_route(self, route) -> None:
        """Raises ValueError where this mixer needs every layer in order, and `route` (None: there is none) says otherwise."""

    def reach(self, cfg) -> int:
        """How many tokens of the stream a token sees at a layer, itself the last; attention is not counted. 1: itself only."""
        return 1

    def first_reach(self, cfg) -> int:
        """How many tokens' embeddings a token's first state is made of, itself the last."""
        return 1

    def memory(self, cfg) -> dict:
        """The shapes, for one token of one layer, of what `kept` gives at each site; sites where nothing is kept are left out.
        The cache has room for that."""
        return {}

    def kept(self, cfg, params, state, site: Site):
        """What later tokens see of these at this site: a pytree of [B, T, ...]. Asked for where `memory` names the site."""
        raise NotImplementedError

    def spec(self, cfg) -> dict:
        """Parameters for one layer (stacked by the caller)."""
        return {}

    def first_spec(self, cfg) -> dict:
        """Parameters of what makes the first state, which no layer has."""
        return {}

    def head_spec(self, cfg) -> dict:
        """Parameters of what the head reads, which no layer has."""
        return {}

    def flops(self, cfg) -> int:
        """Forward matmul FLOPs for one token of one layer, on average over the layers."""
        return 0

    def init(self, cfg, x_BxTxD):
        """The state at the first layer, from the embedding. A mixer with a `first_reach` is given `(params, behind)` more:
        those of `first_spec`, and embeddings as `Behind`."""
        raise NotImplementedError

    def tokens(self, state) -> tuple[int, int]:
        """Rows and tokens, (B, T)."""
        raise NotImplementedError

    def read(self, cfg, params, state, layer, site: Site) -> tuple[Any, Any]:
        """What a branch of `layer` sees, [B, T, D] or (attention) `Streams`, and what `write` is to be told of it. At a site
        that `memory` names, `Behind` is given as one argument more, and the state is arrays [B, T, ...] alone: where a row's
        tokens lie over devices, each run of consecutive ones is given as a row (`jaxpar.models.reach`)."""
        raise NotImplementedError

    def write(self, cfg, params, state, told, y_BxTxD, layer, site: Site):
        """The state after a branch of `layer` gave `y`."""
        raise NotImplementedError

    def commit(self, cfg, state, layer):
        """The state behind `layer`, once both of its branches are written."""
        return state

    def final(self, cfg, params, state):
        """What the head sees: [B, T, D]. `params`: those of `head_spec`."""
        raise NotImplementedError

    def to_wire(self, cfg, state):
        """The payload that crosses a pipeline boundary: a pytree of static shapes."""
        return state

    def from_wire(self, cfg, wire):
        """The state behind a pipeline boundary."""
        return wire

    def wire_bytes(self, cfg, rows: int, tokens: int) -> int:
        """Bytes that cross a pipeline boundary for so many rows, forwards; as many gradients come back."""
        x = jax.ShapeDtypeStruct((rows, tokens, cfg.width), jnp.dtype(cfg.dtype))
        more = ()
        if (n := self.first_reach(cfg) - 1) or self.first_spec(cfg):
            params = jax.tree.map(
                lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype),
                self.first_spec(cfg),
                is_leaf=lambda s: hasattr(s, "axes"),
            )
            longer = jax.ShapeDtypeStruct((rows, n + tokens, cfg.width), x.dtype)
            more = (params, Behind(longer, jax.ShapeDtypeStruct((rows, n + tokens), jnp.int32)))
        wire = jax.eval_shape(lambda x, *more: self.to_wire(cfg, self.init(cfg, x, *more)), x, *more)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(wire))


class Stack(NamedTuple):
    """The state of a mixer that keeps sources. n slots; slots that no layer has written yet are zero.

    Attributes:
      slots: [n, B, T, D]; slot 0 is the embedding.
      carry: what else goes from layer to layer.
      fresh: the sources of the layer at hand, which `commit` puts in their slots; empty between layers.
      stream: what the layer's second branch is told by its first; None between layers.
      ahead: what the layer's branches see of the slots, a tree for attention and one for the feed-forward, where that was
        computed for several layers at once (`StackMixer.ahead`); there are no slots then.
    """

    slots: Any
    carry: Any = None
    fresh: tuple = ()
    stream: Any = None
    ahead: Any = None


@dataclass(frozen=True)
class StackMixer(DepthMixer):
    """Keeps a source of every layer: one slot a layer unless a mixer says otherwise."""

    write_once: ClassVar[bool] = True

    def slots(self, cfg) -> int:
        """How many slots there are."""
        return cfg.layers + 1

    def check_route(self, route) -> None:
        # A layer that is left out leaves no source, and one that runs early reads slots that nobody has written.
        if route is not None:
            raise ValueError(
                f"model.residual = {type(self).__name__} reads a source of every layer before it, and here layers are left "
                "out, scaled or swapped; train without skipping, recovery's swaps and the schedules skippipe and checkfree+, "
                "or take an operator without sources: Plain, HyperConnections, ManifoldHyperConnections, DeepDelta"
            )

    def together(self, cfg, divisor: int) -> int:
        """How many layers in a row see the same slots, so that these are looked at once for all of them; 0: each looks
        itself. A mixer that says more has `ahead` and `ahead_back`, and blocks of so many layers write slots that follow
        each other.

        Args:
          divisor: of the first layer's number; that number itself, where it is known.
        """
        return 0

    def ahead(self, cfg, params, slots_nxBxTxD, layer):
        """What both branches of k layers see of the slots, `layer` the first of them: a pytree of [B, T, k, 2, ...]; and what
        is kept of it for `ahead_back`.

        Args:
          params: theirs of `spec`, leaves [k, ...].
        """
        raise NotImplementedError

    def ahead_back(self, cfg, params, slots_nxBxTxD, layer, kept, g_seen, g_nxBxTxD):
        """Its backward pass: the gradient of `params`, and that of the slots, `g_nxBxTxD` with what comes from here added.

        Args:
          kept, g_seen: as `ahead` gave it, and the gradient of what was seen. `slots_nxBxTxD` may have been written
            since, where nothing was seen.
        """
        raise NotImplementedError

    def places(self, cfg, layer) -> tuple:
        """The slots that `layer` writes, in the order of `Stack.fresh`. A later layer may write one again as long as
        nobody read it before."""
        return (layer + 1,)

    def init(self, cfg, x_BxTxD) -> Stack:
        # Padded, not set into zeros: the buffer lies over the devices as the embedding does.
        rest = (0, self.slots(cfg) - 1)
        return Stack(jnp.pad(x_BxTxD[None], (rest, (0, 0), (0, 0), (0, 0))))

    def tokens(self, state: Stack) -> tuple[int, int]:
        return state.slots.shape[1:3]

    def mix(self, cfg, params, slots_nxBxTxD, layer):
        """Inputs of a layer, from the sources before it: `(what attention sees, the stream that the layer adds to)`."""
        raise NotImplementedError

    def commit(self, cfg, state: Stack, layer) -> Stack:
        slots = state.slots
        for place, fresh in zip(self.places(cfg, layer), state.fresh, strict=True):
            slots = jax.lax.dynamic_update_index_in_dim(slots, fresh, place, 0)
        return Stack(slots, state.carry)


@dataclass(frozen=True)
class Cumulative(StackMixer):
    """A layer adds its branches to a mix of the states before it; the sum is the next source."""

    sources: ClassVar[Literal["cumulative"]] = "cumulative"

    def read(self, cfg, params, state: Stack, layer, site: Site):
        if site == "feedforward":
            return state.stream, state.stream
        return again(self.mix, cfg, params, state.slots, layer)

    def write(self, cfg, params, state: Stack, told, y_BxTxD, layer, site: Site) -> Stack:
        new = told + y_BxTxD
        return state._replace(stream=new) if site == "attention" else state._replace(fresh=(new,))

    def final(self, cfg, params, state: Stack):
        return state.slots[-1]


@dataclass(frozen=True)
class Deltas(StackMixer):
    """The feed-forward branch sees the layer's input plus attention's output; the sum of both outputs is the next
    source."""

    sources: ClassVar[Literal["deltas"]] = "deltas"

    def read(self, cfg, params, state: Stack, layer, site: Site):
        if site == "feedforward":
            given, x = state.stream
            return x + given, given
        return again(self.mix, cfg, params, state.slots, layer)

    def write(self, cfg, params, state: Stack, told, y_BxTxD, layer, site: Site) -> Stack:
        if site == "attention":
            return state._replace(stream=(y_BxTxD, told))
        return state._replace(fresh=(told + y_BxTxD,))


def number_of(layer):
    """A layer's number that is known as an int, so that later slots are cut off and not masked; one that is traced as it
    is."""
    return layer if hasattr(layer, "aval") else int(layer)


def again(mix: Callable, cfg, params, slots, layer, *more):
    """`mix`, computed again in the backward pass: the buffer itself is all that is kept of it, and no copy of it."""
    layer = number_of(layer)
    if isinstance(layer, int):
        run = lambda params, slots, *more: mix(cfg, params, slots, layer, *more)
        return jax.checkpoint(run, prevent_cse=False)(params, slots, *more)
    run = lambda params, slots, layer, *more: mix(cfg, params, slots, layer, *more)
    return jax.checkpoint(run, prevent_cse=False)(params, slots, layer, *more)


def seen(slots, last):
    """The slots up to and with `last`, and a mask of those that are visible among them (None: all).

    Args:
      last: an int, which cuts the others off, or traced.
    """
    if isinstance(last, int):
        return slots[: last + 1], None
    return slots, jnp.arange(slots.shape[0]) <= last


def masked(mask, weights_n, value=0.0):
    """Weights [n, ...] of slots, `value` where a slot is not visible."""
    if mask is None:
        return weights_n[...]
    return jnp.where(mask.reshape(-1, *(1,) * (weights_n.ndim - 1)), weights_n, value)


def weighted(weights, slots_nxBxTxD):
    """Σ_i weights_i · slots_i, summed in float32, in the slots' dtype. Weights: [n] or [n, B, T]."""
    if weights.ndim == 1:
        total = jnp.einsum(
            "n,nbtd->btd", weights.astype(slots_nxBxTxD.dtype), slots_nxBxTxD, preferred_element_type=jnp.float32
        )
        return total.astype(slots_nxBxTxD.dtype)
    return _by_token(weights.astype(slots_nxBxTxD.dtype), slots_nxBxTxD)


def _by_token(weights_nxBxT, slots_nxBxTxD):
    """`weighted` with weights by token. As one product it would be as many tiny ones as there are tokens, forwards and
    backwards, which CPUs do slowly; this is a few passes over the slots. It has no forward-mode derivative."""

    @jax.custom_vjp
    def run(weights, slots):
        parts = (w[..., None].astype(jnp.float32) * x.astype(jnp.float32) for w, x in zip(weights, slots, strict=True))
        return sum(parts).astype(slots.dtype)

    def back(saved, g_BxTxD):
        weights, slots = saved
        d_weights = jnp.stack([dot(g_BxTxD, x) for x in slots]).astype(weights.dtype)
        return d_weights, weights[..., None] * g_BxTxD[None]

    run.defvjp(lambda weights, slots: (run(weights, slots), (weights, slots)), back)
    return run(weights_nxBxT, slots_nxBxTxD)


def dot(a, b):
    """Σ a · b over the last dimension, float32 or better. As a product, because XLA's sums of rows use no vectors on a CPU."""
    precise = jnp.promote_types(a.dtype, jnp.float32)
    # A TPU would multiply in bfloat16 otherwise.
    return jnp.einsum("...d,...d->...", a, b, preferred_element_type=precise, precision=jax.lax.Precision.HIGHEST)


def slot(slots, i):
    """Slot `i`, which may be traced."""
    return slots[i] if isinstance(i, int) else jax.lax.dynamic_index_in_dim(slots, i, 0, keepdims=False)
