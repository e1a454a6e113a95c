"""Permutes under branches that devices take differently: wrong numbers without an error, so they are looked for.

A collective permute is one meeting of all devices of its operation, also of those that its route leaves out. Where some of
them are in another branch of a condition they do not come, or meet another permute: XLA on CPU then mixes up the data.
Sums and gathers meet in groups, and a group whose devices all take the same branch is safe.
"""

from __future__ import annotations

from collections.abc import Iterator

from jaxpar.pallas_kernels.varying import varies_over_type

PERMUTES = {"ppermute", "collective_permute", "psend", "precv"}


def inner_jaxprs(eqn) -> Iterator:
    """The jaxprs inside an equation: of calls, loops and branches."""
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one


def permutes(jaxpr) -> set[str]:
    """The mesh axes of all permutes in a jaxpr, and in those inside it."""
    found: set[str] = set()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name in PERMUTES:
            axis = eqn.params["axis_name"]
            found.update((axis,) if isinstance(axis, str) else axis)
        for inner in inner_jaxprs(eqn):
            found |= permutes(inner)
    return found


def divergent_permutes(jaxpr) -> list[str]:
    """A sentence for each branch that holds a permute and whose condition differs between devices."""
    found = []
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "cond":
            over = varies_over_type(eqn.invars[0].aval)
            inside = set().union(*(permutes(branch) for branch in eqn.params["branches"]))
            if over and inside:
                found.append(
                    f"a permute over {', '.join(sorted(inside))} stands in a branch whose condition differs over "
                    f"{', '.join(sorted(over))}"
                )
        for inner in inner_jaxprs(eqn):
            found += divergent_permutes(inner)
    return found
