"""Cutting a jaxpr: only what some outputs need, computed from inputs and from values that another part has made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import jax
from jax.extend import core

CALLS = {"jit", "pjit", "closed_call", "core_call"}
"""Primitives that only call a jaxpr: opened, so that what is inside can be cut too."""


def is_variable(atom) -> bool:
    """Not a constant that is written into the jaxpr."""
    return not isinstance(atom, core.Literal)


def inline(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The same computation with nested calls opened. Loops and branches stay whole."""

    def run(*inputs):
        return _evaluate(closed.jaxpr, closed.consts, inputs)

    return jax.make_jaxpr(run)(*[v.aval for v in closed.jaxpr.invars])


def _evaluate(jaxpr, consts, inputs) -> list:
    env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, inputs, strict=True))
    read = lambda atom: env[atom] if is_variable(atom) else atom.val
    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name in CALLS:
            inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
            results = _evaluate(inner.jaxpr, inner.consts, values)
        else:
            results = _bind(eqn, values)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bind(eqn, values) -> list:
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # a pair in older releases
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*functions, *values, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def needed(jaxpr, outputs: Iterable, known: Iterable = ()) -> tuple[list[int], list]:
    """What must run to have `outputs`.

    Args:
      outputs: variables of the jaxpr (constants among them are passed over).
      known: variables that are given.

    Returns:
      The numbers of the equations, in order, and the variables that they (or `outputs`) take from outside: given ones,
      inputs and constants of the jaxpr, in the order of their first use.
    """
    known = set(known)
    wanted = {v for v in outputs if is_variable(v)} - known
    eqns = []
    for k in range(len(jaxpr.eqns) - 1, -1, -1):
        eqn = jaxpr.eqns[k]
        if not wanted.isdisjoint(eqn.outvars):
            eqns.append(k)
            wanted |= {v for v in eqn.invars if is_variable(v)} - known
    eqns.reverse()
    made = {v for k in eqns for v in jaxpr.eqns[k].outvars}
    reads = [v for k in eqns for v in jaxpr.eqns[k].invars] + list(outputs)
    outside = dict.fromkeys(v for v in reads if is_variable(v) and v not in made)
    return eqns, list(outside)


def depends(jaxpr, inputs: Iterable) -> set:
    """All variables that are computed from any of `inputs`, these included."""
    found = set(inputs)
    for eqn in jaxpr.eqns:
        if any(is_variable(v) and v in found for v in eqn.invars):
            found.update(eqn.outvars)
    return found


def part(closed: core.ClosedJaxpr, outputs: Sequence, known: Sequence) -> Callable[[Sequence], list]:
    """A function from the values of `known` to those of `outputs`; other inputs of the jaxpr must not be needed."""
    jaxpr = closed.jaxpr
    eqns, _ = needed(jaxpr, outputs, known)
    consts = dict(zip(jaxpr.constvars, closed.consts, strict=True))

    def run(values: Sequence) -> list:
        env = consts | dict(zip(known, values, strict=True))
        read = lambda atom: env[atom] if is_variable(atom) else atom.val
        for k in eqns:
            eqn = jaxpr.eqns[k]
            env.update(zip(eqn.outvars, _bind(eqn, [read(v) for v in eqn.invars]), strict=True))
        return [read(v) for v in outputs]

    return run
