"""FLOPs that a call really executes: its program run operation by operation, products counted.

A compiler's own count takes a loop's body once and every branch of a condition. Here loops count as often as they turn, and
of a condition only the branch that is taken, so work that is left out shows, and work that is done and thrown away (a
masked layer) shows too. For small arguments on one device: nothing is compiled, and every operation is a call of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core

CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call"}
PROGRAMS = ("call_jaxpr", "fun_jaxpr", "jaxpr")


def executed_flops(f: Callable, *args: Any) -> float:
    """FLOPs of the matrix products and convolutions of `f(*args)`: 2·n·m·k for [n, k] · [k, m].

    Raises:
      ValueError: an operation with a program of its own that is not known here, or a convolution.
    """
    closed = jax.make_jaxpr(f)(*args)
    count = [0.0]
    _run(closed.jaxpr, closed.consts, jax.tree.leaves(args), count)
    return count[0]


def _run(jaxpr, consts, args, count) -> list:
    value = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda v: v.val if isinstance(v, core.Literal) else value[v]
    for eqn in jaxpr.eqns:
        out = _one(eqn, [read(v) for v in eqn.invars], count)
        value.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _one(eqn, args: list, count) -> list:
    name, params = eqn.primitive.name, eqn.params
    inner = lambda closed, args: _run(closed.jaxpr, closed.consts, args, count)
    match name:
        case "scan":
            return _scan(eqn, args, inner)
        case "while":
            n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
            for_cond, for_body, carry = args[:n_cond], args[n_cond : n_cond + n_body], args[n_cond + n_body :]
            while bool(inner(params["cond_jaxpr"], [*for_cond, *carry])[0]):
                carry = inner(params["body_jaxpr"], [*for_body, *carry])
            return carry
        case "cond":
            return inner(params["branches"][int(args[0])], args[1:])
        case "conv_general_dilated":
            raise ValueError("convolutions are not counted")
        case "dot_general":
            count[0] += _product(eqn)
    found = next((params[key] for key in PROGRAMS if key in params), None)
    if name in CALLS and found is not None:
        return inner(found, args) if hasattr(found, "consts") else _run(found, [], args, count)
    if found is not None and not name.startswith(("scatter", "reduce")):
        raise ValueError(f"the operation {name} has a program of its own, and how it runs is not known here")
    out = eqn.primitive.bind(*args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _scan(eqn, args, inner) -> list:
    params, body = eqn.params, eqn.params["jaxpr"].jaxpr
    # How JAX names the numbers of constants, carried values and rows has changed (0.12). A row has a dimension more outside
    # than inside, what is carried has not.
    rows_of = lambda outside, inside: sum(o.aval.ndim > i.aval.ndim for o, i in zip(outside, inside, strict=True))
    n_carry = len(body.outvars) - rows_of(eqn.outvars, body.outvars)
    n_consts = len(args) - n_carry - rows_of(eqn.invars, body.invars)
    consts, carry, xs = args[:n_consts], args[n_consts : n_consts + n_carry], args[n_consts + n_carry :]
    order = range(params["length"])
    rows = []
    for i in reversed(order) if params["reverse"] else order:
        out = inner(params["jaxpr"], [*consts, *carry, *(x[i] for x in xs)])
        carry = out[:n_carry]
        rows.append(out[n_carry:])
    if params["reverse"]:
        rows.reverse()
    if not rows:
        return [
            *carry,
            *(np.zeros(v.aval.shape, v.aval.dtype)[None][:0] for v in body.outvars[n_carry:]),
        ]
    return [*carry, *(jax.numpy.stack(column) for column in zip(*rows, strict=True))]


def _product(eqn) -> float:
    (contract, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[d] for d in contract)
