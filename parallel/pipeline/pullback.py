"""A stage and its backward pass in pieces that run at different ticks, with as little kept between them as they need.

`jax.vjp` alone would keep whatever the backward pass reads: weights (cast and reshaped ones too), rotary tables, dropout
masks. Here the traced forward pass is looked at. What follows from the weights and the microbatch alone is made again
where it is read, and so is what follows from other kept values by operations on single elements (an activation
function, a norm's product): they cost less than a place in a buffer. What is left are results of matrix products and sums.

The split of the backward pass into the input's gradient (BI) and the weights' (BW) is a cut of its jaxpr (Qi et al.
2023, "Zero Bubble Pipeline Parallelism", §2): BW runs the equations that no input gradient needs, and each equation runs
in exactly one of the two. Loops are never cut, so layers must be unrolled for the split to be worth something.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxpar.parallel.pipeline.jaxprs import depends, inline, is_variable, needed, part

Tree = Any


@dataclass(frozen=True)
class Pullback:
    """The pieces of one stage. `params`, `aux`: what the stage was given, to be given again.

    Attributes:
      forward: (params, x, aux) -> y, kept.
      pull: (params, aux, kept, dy) -> d_params, dx.
      pull_input: (params, aux, kept, dy) -> dx, kept_for_weights.
      pull_weights: (params, aux, kept_for_weights) -> d_params.
      products: () -> the matrix products in B, BI and BW, for tests and for looking at a split.
    """

    forward: Callable
    pull: Callable
    pull_input: Callable
    pull_weights: Callable
    products: Callable[[], dict[str, int]]


def pullback(f: Callable, params: Tree, x: Tree, aux: Tree, *, thin: bool = True) -> Pullback:
    """Trace `f(params, x, aux) -> y` and cut it. Arguments may be abstract: their shapes and types count.

    With `thin = False` all that the backward pass reads is kept, as `jax.vjp` does: for values that lie in no buffer.
    Kept values are lists of arrays; their shapes are those of `jax.eval_shape(result.forward, params, x, aux)[1]`.
    """
    shapes: dict[str, Any] = {}

    def forward_all(params, x, aux):
        y, pull = jax.vjp(lambda p, x: f(p, x, aux), params, x)
        leaves, shapes["pull"] = jax.tree.flatten(pull)
        y, shapes["y"] = jax.tree.flatten(y)
        return y, leaves

    traced = inline(jax.make_jaxpr(forward_all)(params, x, aux))
    size = lambda tree: len(jax.tree.leaves(tree))
    n_params, n_x, n_y = size(params), size(x), shapes["y"].num_leaves
    inputs = traced.jaxpr.invars
    y_out, residuals = traced.jaxpr.outvars[:n_y], traced.jaxpr.outvars[n_y:]
    from_x = depends(traced.jaxpr, inputs[n_params : n_params + n_x])
    is_kept = lambda v: is_variable(v) and (v in from_x or not thin)
    kept_vars = list(dict.fromkeys(filter(is_kept, residuals)))
    cheap_vars: list = []
    if thin:
        all_vars, kept_vars = kept_vars, thinned(traced.jaxpr, kept_vars, from_x)
        cheap_vars = [v for v in all_vars if v not in set(kept_vars)]
    again_vars = list(dict.fromkeys(v for v in residuals if is_variable(v) and not is_kept(v)))
    given = inputs[:n_params] + inputs[n_params + n_x :]
    run_forward = part(traced, [*y_out, *kept_vars], inputs)
    run_again = part(traced, again_vars, given)
    run_cheap = part(traced, [*again_vars, *cheap_vars], [*given, *kept_vars])
    flat = lambda *trees: jax.tree.leaves(trees)

    def forward(params, x, aux):
        found = run_forward(flat(params, x, aux))
        return jax.tree.unflatten(shapes["y"], found[:n_y]), found[n_y:]

    def leaves_of(params, aux, kept) -> list:
        """Everything that the pulled-back function reads."""
        value = dict(zip(kept_vars, kept, strict=True))
        value |= zip([*again_vars, *cheap_vars], run_cheap([*flat(params, aux), *kept]), strict=True)
        return [value[v] if is_variable(v) else v.val for v in residuals]

    def pull(params, aux, kept, dy):
        return jax.tree.unflatten(shapes["pull"], leaves_of(params, aux, kept))(dy)

    def backward(leaves, dy):
        d_params, dx = jax.tree.unflatten(shapes["pull"], leaves)(dy)
        return flat(d_params), flat(dx)

    cell: dict[str, Any] = {}

    def cut() -> dict[str, Any]:
        """The backward jaxpr in two, made when first asked for."""
        if not cell:
            avals = [v.aval for v in residuals]
            back = inline(jax.make_jaxpr(backward)(avals, jax.tree.unflatten(shapes["y"], [v.aval for v in y_out])))
            jaxpr = back.jaxpr
            outs_w, outs_x = jaxpr.outvars[:n_params], jaxpr.outvars[n_params:]
            eqns_x, _ = needed(jaxpr, outs_x)
            made_x = {v for k in eqns_x for v in jaxpr.eqns[k].outvars}
            _, boundary = needed(jaxpr, outs_w, made_x | set(jaxpr.invars))
            # Of the boundary, what the stage can make again from its weights and its microbatch is not kept.
            again = {a: v for a, v in zip(jaxpr.invars, residuals, strict=False) if not is_kept(v)}
            consts = set(jaxpr.constvars)
            keep = [v for v in boundary if v not in again and v not in consts]
            remade = [v for v in boundary if v in again]
            cell["input"] = part(back, [*outs_x, *keep], jaxpr.invars)
            cell["weights"] = part(back, outs_w, [*keep, *remade])
            cell["remade"] = [jaxpr.invars.index(v) for v in remade]
            cell["products"] = {
                "B": _products(jaxpr, jaxpr.outvars, ()),
                "BI": _products(jaxpr, [*outs_x, *keep], ()),
                "BW": _products(jaxpr, outs_w, boundary),
            }
        return cell

    def pull_input(params, aux, kept, dy):
        found = cut()["input"]([*leaves_of(params, aux, kept), *jax.tree.leaves(dy)])
        return jax.tree.unflatten(jax.tree.structure(x), found[:n_x]), found[n_x:]

    def pull_weights(params, aux, kept):
        pieces = cut()
        again = dict(zip(again_vars, run_again(flat(params, aux)), strict=True))
        value = lambda v: again[v] if is_variable(v) else v.val
        remade = [value(residuals[i]) for i in pieces["remade"]]
        return jax.tree.unflatten(jax.tree.structure(params), pieces["weights"]([*kept, *remade]))

    return Pullback(forward, pull, pull_input, pull_weights, lambda: cut()["products"])


ELEMENTWISE = {
    "abs", "add", "add_any", "and", "convert_element_type", "cos", "div", "eq", "erf", "exp", "exp2", "expm1", "ge", "gt",
    "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow",
    "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "sub", "tanh",
    # ... and those that only look at elements in another shape.
    "broadcast_in_dim", "expand_dims", "pcast", "pvary", "reshape", "squeeze",
}  # fmt: skip
"""Primitives that are done again rather than kept: one pass over their operands, which fuses with what reads it."""


def thinned(jaxpr, kept: list, from_x: set) -> list:
    """Those of `kept` (variables, in the order in which they are made) that do not follow cheaply from the others."""
    producer = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    order = {v: k for k, v in enumerate(producer)}
    left = set(kept)
    # The latest first: roots stay.
    for v in sorted(kept, key=lambda v: order.get(v, -1), reverse=True):
        left.discard(v)
        if not _follows(v, left, from_x, producer):
            left.add(v)
    return [v for v in kept if v in left]


def _follows(v, kept: set, from_x: set, producer: dict) -> bool:
    """Whether v comes by elementwise operations from kept variables and from what does not depend on the input."""
    seen, todo = set(), [v]
    while todo:
        u = todo.pop()
        if not is_variable(u) or u in kept or u not in from_x or u in seen:
            continue
        seen.add(u)
        eqn = producer.get(u)
        if eqn is None or eqn.primitive.name not in ELEMENTWISE:
            return False
        todo += eqn.invars
    return True


def _products(jaxpr, outputs, known) -> int:
    return sum(jaxpr.eqns[k].primitive.name == "dot_general" for k in needed(jaxpr, outputs, known)[0])
