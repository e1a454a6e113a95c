"""Attention Residuals: each branch reads a softmax over what the branches before it gave (Kimi Team 2026).

Not by the kernels of `pallas_kernels.attention`: each token has keys of its own, at most 2 · layers + 1 of them, and one query,
so a block of logits has one row and a matrix unit nothing to do. The read moves D numbers a source and multiplies each a
few times, so memory bounds it, and XLA fuses norm, softmax and sum without a T x S block that a kernel could save.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxpar.models.lazy import jax, jnp
from jaxpar.models.residual.base import Deltas, Stack, again, dot, masked, number_of, seen, weighted
from jaxpar.models.spec import Constant, ParamSpec


@dataclass(frozen=True)
class AttentionResiduals(Deltas):
    """`h_s = Σ_i softmax_i(w_s · RMSNorm_s(v_i)) · v_i` over the embedding v_0 and the outputs v_1 ... v_s of the branches
    before (arXiv 2603.15031, eq. 2 to 4); with no 1/√D. The head reads so too. Branches count from 0, attention even.

    With `block = S > 1` the outputs of S branches in a row are summed, and sources are the embedding, the sums of whole
    blocks and that of the block at hand so far (section 3.2). The last block may be shorter. S = 1 is the full form.

    Equal to the plain stream at initialisation, for every block size, under "pre" norms: queries start at zero, so each
    read is the sources' mean, the plain stream over their number, and the norm behind it takes the factor out, but for
    its epsilon (1e-4 of a logit at 1e-6). Under "post" norms the branch sees the factor.

    Attributes:
      block: branches whose outputs are one source.
      phases: "two": all branches of a block look at the whole blocks together, once, and each merges the block's sum so far
        by its log-sum-exp (algorithm 1). So in training, where blocks are of whole layers and the layers at hand begin one
        (in pipelines: every stage does, and all have as many); elsewhere, as in generation, the two branches of a layer do.
        "direct": each looks at them itself. None: "two" where blocks are of whole layers.
      epsilon: of the norm of keys.
    """

    block: int = 1
    phases: Literal["direct", "two"] | None = None
    epsilon: float = 1e-6

    def check(self, cfg) -> None:
        if not 1 <= self.block <= 2 * cfg.layers:
            raise ValueError(
                f"residual.block = {self.block} branches is outside 1 to {2 * cfg.layers}, the branches of model.layers = "
                f"{cfg.layers} layers; {2 * cfg.layers} makes one block of them all"
            )

    @property
    def in_two(self) -> bool:
        return self.block % 2 == 0 if self.phases is None else self.phases == "two"

    def reader(self, cfg) -> dict:
        return {
            "query": ParamSpec((cfg.width,), ("norm",), Constant(0.0), decay=False),
            "scale": ParamSpec((cfg.width,), ("norm",), Constant(1.0), decay=False),
        }

    def spec(self, cfg) -> dict:
        return {"attention": self.reader(cfg), "feedforward": self.reader(cfg)}

    def head_spec(self, cfg) -> dict:
        return self.reader(cfg)

    def flops(self, cfg) -> int:
        sources = 2 + cfg.layers / self.block
        return round(2 * 2 * 2 * cfg.width * sources)

    def slots(self, cfg) -> int:
        return 1 + -(-2 * cfg.layers // self.block)

    def places(self, cfg, layer) -> tuple:
        # A block's slot is written by each of its branches, and read once it is whole.
        return tuple(1 + (2 * layer + i) // self.block for i in range(2))

    def init(self, cfg, x_BxTxD) -> Stack:
        return super().init(cfg, x_BxTxD)._replace(carry=jnp.zeros_like(x_BxTxD))

    def together(self, cfg, divisor: int) -> int:
        k = self.block // 2
        return k if self.in_two and self.block % 2 == 0 and divisor % k == 0 else 0

    def readers(self, cfg, params):
        """Of k layers, a layer's two beside each other: float32 [2k, D]."""
        pairs = [params[name]["query"] * params[name]["scale"] for name in ("attention", "feedforward")]
        return jnp.stack(pairs, 1).reshape(-1, cfg.width).astype(jnp.float32)

    # What is imported in methods imports JAX, which a command's `--help` does without.
    def ahead(self, cfg, params, slots_nxBxTxD, layer):
        from jaxpar.models.residual.depth_reads import reads

        slots, mask = seen(slots_nxBxTxD, 2 * number_of(layer) // self.block)
        found = reads(self.readers(cfg, params), slots, mask, self.epsilon)
        # A branch's place among its layer's two goes last.
        apart = lambda x: x.reshape(*x.shape[:2], -1, 2, *x.shape[3:])
        return jax.tree.map(apart, found), found[1]

    def ahead_back(self, cfg, params, slots_nxBxTxD, layer, kept, g_seen, g_nxBxTxD):
        from jaxpar.models.residual.depth_reads import reads_back

        w_RxD, pull = jax.vjp(lambda params: self.readers(cfg, params), params)
        together = lambda g: g.reshape(*g.shape[:2], -1, *g.shape[4:])
        count = 2 * number_of(layer) // self.block + 1
        g_read = jax.tree.map(together, g_seen)
        d_w, g = reads_back(w_RxD, slots_nxBxTxD, count, kept, g_read, g_nxBxTxD, self.epsilon)
        return *pull(d_w), g

    def logits(self, params, x):
        """How much a reader likes sources [..., D]: float32 [...]. Norm and product in one pass, in float32."""
        x = x.astype(jnp.float32)
        w_D = params["query"].astype(jnp.float32) * params["scale"].astype(jnp.float32)
        return jnp.dot(x, w_D, precision=jax.lax.Precision.HIGHEST) * jax.lax.rsqrt(
            dot(x, x) / x.shape[-1] + self.epsilon
        )

    def partial_softmax(self, params, slots_nxBxTxD, last):
        """Over the slots up to `last`: weighted sum, maximum and sum of exponentials, unnormalised."""
        slots, mask = seen(slots_nxBxTxD, last)
        s_nxBxT = masked(mask, self.logits(params, slots), -jnp.inf)
        m_BxT = jax.lax.stop_gradient(s_nxBxT.max(0))
        e_nxBxT = jnp.exp(s_nxBxT - m_BxT[None])
        return weighted(e_nxBxT, slots), m_BxT, e_nxBxT.sum(0)

    def merged(self, params, whole, rest_BxTxD, there):
        """`whole` slots and one more source, where it is `there`."""
        from jaxpar.models.residual.depth_reads import merge
        from jaxpar.pallas_kernels.varying import alike

        w_D = params["query"].astype(jnp.float32) * params["scale"].astype(jnp.float32)
        return merge(*alike(w_D, whole, rest_BxTxD), there, self.epsilon)

    def mix(self, cfg, params, slots, layer, rest_BxTxD, first):
        """A branch's input: attention's (`first`) or the feed-forward's."""
        branch, name = (2 * layer, "attention") if first else (2 * layer + 1, "feedforward")
        whole = self.partial_softmax(params[name], slots, 2 * layer // self.block)
        return self.merged(params[name], whole, rest_BxTxD, branch % self.block != 0 if first else True)

    def both(self, cfg, params, slots, layer):
        """Of both branches of a layer: their parts of the whole blocks."""
        last = 2 * layer // self.block
        return tuple(self.partial_softmax(params[name], slots, last) for name in ("attention", "feedforward"))

    def read(self, cfg, params, state: Stack, layer, site):
        first = site == "attention"
        if state.ahead is not None:
            rest_BxTxD = state.carry if first else state.fresh[0]
            there = 2 * number_of(layer) % self.block != 0 if first else True
            return self.merged(params[site], state.ahead[not first], rest_BxTxD, there), None
        # What attention gave is a source of its own or the block's sum so far: by now a source in any case.
        rest_BxTxD = state.carry if first else state.fresh[0]
        if not self.in_two:
            run = lambda cfg, params, slots, layer, rest: self.mix(cfg, params, slots, layer, rest, first)
            return again(run, cfg, params, state.slots, layer, rest_BxTxD), None
        both = again(self.both, cfg, params, state.slots, layer) if first else state.stream
        there = 2 * number_of(layer) % self.block != 0 if first else True
        return self.merged(params[site], both[not first], rest_BxTxD, there), both

    def write(self, cfg, params, state: Stack, told, y_BxTxD, layer, site) -> Stack:
        branch = 2 * number_of(layer) + (site == "feedforward")
        before = state.carry if site == "attention" else state.fresh[0]
        if state.ahead is not None:
            # A block's first layer is given zeros, and who runs the block takes the sum from its last.
            new = before + y_BxTxD
            return state._replace(fresh=(new,)) if site == "attention" else state._replace(fresh=(), carry=new)
        starts = branch % self.block == 0
        new = y_BxTxD if self.block == 1 else jnp.where(starts, y_BxTxD, before + y_BxTxD)
        if site == "attention":
            return state._replace(fresh=(new,), stream=told)
        ends = (branch + 1) % self.block == 0
        return state._replace(fresh=(*state.fresh, new), carry=jnp.where(ends, jnp.zeros_like(new), new), stream=None)

    def to_wire(self, cfg, state: Stack):
        # Blocks of one and two branches end with a layer: between layers no sum is open.
        return state.slots if self.block <= 2 else (state.slots, state.carry)

    def from_wire(self, cfg, wire) -> Stack:
        return Stack(wire, jnp.zeros_like(wire[0])) if self.block <= 2 else Stack(*wire)

    def final(self, cfg, params, state: Stack):
        branches = 2 * cfg.layers
        whole = self.partial_softmax(params, state.slots, branches // self.block)
        return self.merged(params, whole, state.carry, branches % self.block != 0)
