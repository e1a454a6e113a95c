"""Where every array of a training state lies, before it exists: for restoring, for `explain`, and for `jit`."""

from __future__ import annotations

from typing import Any

import jax

from jaxpar.models.spec import LAYERS, Constant, ParamSpec, abstract, flatten, path_name
from jaxpar.parallel.rules import shardings
from jaxpar.program import Program
from jaxpar.step import Step, TrainState

Tree = Any


def abstract_state(step: Step, program: Program, key) -> TrainState:
    """`jax.ShapeDtypeStruct`s with shardings for the whole state of `step` on the program's mesh."""
    shapes = jax.eval_shape(step.init, abstract(program.specs), key)
    places = shardings(state_specs(shapes, program.specs), program.mesh, program.rules)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


def state_specs(shapes: Tree, specs: Tree) -> Tree:
    """The logical axes of each array of a state (or a part of one), as a tree of `ParamSpec`.

    A moment, an average or a copy of a parameter stands at a path that ends like the parameter's and has its shape: it
    takes its axes. Anything else that has one entry for each layer (counts, factored moments) keeps the `layers`
    dimension; the rest is replicated.
    """
    flat = flatten(specs)
    # An optimiser that holds the stack apart has the paths inside it.
    ends = flat | {name.removeprefix(f"{LAYERS}/"): s for name, s in flat.items() if s.stacked}
    layers = {s.shape[0] for s in flat.values() if s.stacked}

    def one(path, x) -> ParamSpec:
        parts = path_name(path).split("/")
        axes: tuple = (None,) * x.ndim
        for start in range(len(parts)):
            match = ends.get("/".join(parts[start:]))
            if match is not None:
                if match.shape == x.shape:
                    axes = match.axes
                elif match.stacked and x.shape[:1] == match.shape[:1]:
                    axes = (LAYERS, *axes[1:])
                break
        else:
            if "stacked" in parts and x.ndim and x.shape[0] in layers:
                axes = (LAYERS, *axes[1:])
        return ParamSpec(x.shape, axes, Constant(0.0), str(x.dtype), decay=False)

    return jax.tree_util.tree_map_with_path(one, shapes)
