"""Axis rules: which mesh axes each logical axis of a tensor lies on, checked before anything is traced.

A model names logical axes ("embed", "heads", "batch"); a mesh has axes ("data", "fsdp", "tensor", ...). Rules join the
two, and nothing else does: another layout is another table here and no other line of code. Free of JAX at import.

Everything is duck-typed on `.shape`, `.axes` and `.dtype`: parameters, optimiser moments, averaged copies.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxpar.parallel.mesh import did_you_mean, mesh_sizes, product

Tree = Any
Kind = Literal["params", "activations"]
Pairs = tuple[tuple[str, tuple[str, ...]], ...]

LARGE = 64 * 2**20
"""Bytes from which on a tensor that lies whole on every device is worth an error. A float32 [8192, 2048] kernel."""
SHARING = ("fsdp", "tensor")
"""The mesh axes that are there to share any parameter. On the others whole copies are meant, or (stage) whole layers."""

PARAMS: dict[str, tuple[str, ...]] = {
    "vocabulary": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "head_size": (),
    "norm": (),
    "layers": ("stage",),
}
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "stream": ("sequence",),  # tokens between branches: the residual state and its norms
    "embed": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocabulary": ("tensor",),
    "head_size": (),
}


@dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes; `()` is replicated. Hashable, so it can be static under `jit`.

    Parameters and activations have tables of their own because they differ where it matters: a kernel's "embed" lies on
    `fsdp`, and is gathered before use; an activation's "embed" is whole, because its batch already lies on `fsdp`.

    Attributes:
      params: for parameters, gradients and optimiser state. Given as a mapping or pairs; a value may be a name, a tuple
        of names (the first is outermost), or None for `()`.
      activations: the same for batches and activations.
    """

    params: Pairs = tuple(PARAMS.items())
    activations: Pairs = tuple(ACTIVATIONS.items())

    def __post_init__(self):
        for kind in ("params", "activations"):
            object.__setattr__(self, kind, _canonical(kind, getattr(self, kind)))

    def with_params(self, **axes: str | tuple[str, ...] | None) -> Rules:
        """A copy with other parameter rules: `rules.with_params(kv_heads=(), layers="fsdp")`."""
        return replace(self, params={**dict(self.params), **axes})

    def with_activations(self, **axes: str | tuple[str, ...] | None) -> Rules:
        """A copy with other activation rules: `rules.with_activations(kv_heads=())`."""
        return replace(self, activations={**dict(self.activations), **axes})

    def replicate(self, *axes: str) -> Rules:
        """A copy in which these logical axes lie on no mesh axis, in parameters and activations alike."""
        changed = {kind: {**dict(getattr(self, kind))} for kind in ("params", "activations")}
        for axis in axes:
            if not any(axis in table for table in changed.values()):
                known = sorted({a for table in changed.values() for a in table})
                raise ValueError(f"no rule for {axis!r} to replicate{did_you_mean(axis, known)}: {', '.join(known)}")
            for table in changed.values():
                if axis in table:
                    table[axis] = ()
        return Rules(**changed)

    def mesh_axes(self, axis: str | None, kind: Kind = "params", name: str = "a tensor") -> tuple[str, ...]:
        """The mesh axes of one logical axis. None is never sharded. Raises ValueError for an unknown one."""
        if axis is None:
            return ()
        table = dict(getattr(self, kind))
        if axis not in table:
            raise ValueError(
                f"{name} has the logical axis {axis!r}, for which there is no rule under {kind}"
                f"{did_you_mean(axis, table)}; add one with Rules().with_{kind}({axis}=()) (rules: {', '.join(table)})"
            )
        return table[axis]

    def spec_for(self, axes: Iterable[str | None], kind: Kind = "params", name: str = "a tensor"):
        """The `jax.sharding.PartitionSpec` of a tensor with these logical axes, one entry for each dimension.

        Raises ValueError for an unknown logical axis, and where two dimensions lie on one mesh axis.
        """
        from jax.sharding import PartitionSpec

        rows = self._no_collision(tuple(axes), kind, name)
        return PartitionSpec(*(None if not row else row[0] if len(row) == 1 else row for row in rows))

    def _no_collision(self, axes: tuple[str | None, ...], kind: Kind, name: str) -> list[tuple[str, ...]]:
        rows = [self.mesh_axes(axis, kind, name) for axis in axes]
        for i, row in enumerate(rows):
            for j in range(i):
                if both := set(rows[j]) & set(row):
                    text = ", ".join("None" if not r else "+".join(r) for r in rows)
                    raise ValueError(
                        f"Colliding {kind} rules for {name}: dimension {j} ({axes[j]} -> {'+'.join(rows[j])}) and "
                        f"dimension {i} ({axes[i]} -> {'+'.join(row)}) both lie on mesh axis {' and '.join(both)}, "
                        f"which makes the spec ({text}) impossible; map {axes[j]} or {axes[i]} to other mesh axes or ()"
                    )
        return rows


def _canonical(kind: str, table: Any) -> Pairs:
    """Sorted pairs: two tables that say the same are equal and hash alike."""
    found = {}
    for axis, value in dict(table).items():
        row = _row(value)
        if len(set(row)) < len(row):
            raise ValueError(f"the {kind} rule {axis} -> {'+'.join(row)} names a mesh axis twice; name each once")
        found[axis] = row
    return tuple(sorted(found.items()))


def _row(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def check(
    specs: Tree,
    mesh: Any,
    rules: Rules,
    *,
    rows: int | None = None,
    activations: Mapping[str, int] | None = None,
    large: int = LARGE,
    on_large: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Check parameters, batch and activations against a mesh. Nothing is traced, and no device is needed.

    Args:
      specs: a tree of objects with `.shape`, `.axes` and `.dtype`.
      mesh: a Mesh, a MeshConfig, or a mapping `{axis: size}`.
      rows: the global batch size. None: not checked.
      activations: sizes of further activation dimensions, such as `{"heads": 8, "kv_heads": 2}`.
      large: bytes from which on a matrix must not lie whole on every device while a mesh axis could share it. Norms,
        biases and other vectors are never meant.
      on_large: what happens then.

    Raises:
      ValueError: one sentence for the first of: an unknown logical or mesh axis, colliding rules, a dimension that its
        mesh axes do not divide, a large replicated tensor.
    """
    sizes = mesh_sizes(mesh)
    leaves = list(named(specs))
    _check_mesh_axes(rules, sizes)
    for name, leaf in leaves:
        rules._no_collision(leaf.axes, "params", _title(name, leaf))
    wanted = {**({} if rows is None else {"batch": rows}), **(activations or {})}
    for axis, size in wanted.items():
        row = rules.mesh_axes(axis, "activations", "the batch" if axis == "batch" else "an activation")
        _check_divides("a batch" if axis == "batch" else "an activation", axis, size, row, sizes)
    _check_leaves(leaves, sizes, rules)
    if on_large != "ignore":
        for name, leaf in leaves:
            if sentence := _too_large(name, leaf, leaves, sizes, rules, large):
                if on_large == "error":
                    raise ValueError(sentence)
                warnings.warn(sentence, stacklevel=2)


def _check_mesh_axes(rules: Rules, sizes: Mapping[str, int]) -> None:
    for kind in ("params", "activations"):
        for axis, row in getattr(rules, kind):
            for mesh_axis in row:
                if mesh_axis not in sizes:
                    raise ValueError(
                        f"the {kind} rule {axis} -> {'+'.join(row)} names mesh axis {mesh_axis!r}, which the mesh does "
                        f"not have{did_you_mean(mesh_axis, sizes)}; mesh axes: {', '.join(sizes)}"
                    )


def _check_leaves(leaves: list, sizes: Mapping[str, int], rules: Rules) -> None:
    """Divisibility of every dimension; one sentence for all tensors that fail for the same reason."""
    failing: dict[tuple, list[tuple]] = {}
    for name, leaf in leaves:
        for i, (axis, size) in enumerate(zip(leaf.axes, leaf.shape, strict=True)):
            row = rules.mesh_axes(axis)
            if size % math.prod(sizes[a] for a in row):
                failing.setdefault((axis, size, row), []).append((name, leaf, i))
    for (axis, size, row), found in failing.items():
        name, leaf, i = found[0]
        more = "" if len(found) == 1 else f" (and {len(found) - 1} more with the same {axis})"
        _check_divides(f"{_title(name, leaf)}{more}: dimension {i}", axis, size, row, sizes)


def _check_divides(what: str, axis: str, size: int, row: tuple[str, ...], sizes: Mapping[str, int]) -> None:
    n = math.prod(sizes[a] for a in row)
    if size % n == 0:
        return
    near = " or ".join(str(v) for v in (size // n * n, -(-size // n) * n) if v > 0)
    head = f"{what} of {size} rows" if axis == "batch" else f"{what} ({axis} = {size})"
    used = [a for a in row if sizes[a] > 1]
    equation = product({a: sizes[a] for a in used}) + (f" = {n}" if len(used) > 1 else "")
    fewer = max(d for d in range(1, n) if size % d == 0)
    # Rows, tokens and layers that lie whole on every device would leave these axes without a purpose.
    whole = "" if axis in ("batch", "length", "layers") else f", or replicate it with Rules().replicate({axis!r})"
    raise ValueError(
        f"{head} does not divide over {equation}: {size} / {n} is no whole number; use {near}, or {fewer} instead of "
        f"{n} devices along {' and '.join(used)}{whole}"
    )


def _too_large(name: str, leaf, leaves: list, sizes: Mapping[str, int], rules: Rules, large: int) -> str | None:
    """A sentence where a large matrix lies whole on every device although one more rule would share it."""
    nbytes = math.prod(leaf.shape) * itemsize(leaf.dtype)
    matrix = sum(axis != "layers" for axis in leaf.axes) > 1
    if nbytes < large or not matrix or any(sizes[a] > 1 for axis in leaf.axes for a in rules.mesh_axes(axis)):
        return None
    for mesh_axis in (a for a in SHARING if sizes.get(a, 1) > 1):
        for axis in leaf.axes:
            if axis not in (None, "layers") and _works(leaves, sizes, rules.with_params(**{axis: mesh_axis})):
                return (
                    f"{_title(name, leaf)} lies whole on every device: {nbytes / 2**20:.1f} MiB each, the limit is "
                    f"{large / 2**20:.1f} MiB, and {mesh_axis}({sizes[mesh_axis]}) could share it; use "
                    f"Rules().with_params({axis}={mesh_axis!r}), or a higher limit (large=)"
                )
    return None


def _works(leaves: list, sizes: Mapping[str, int], rules: Rules) -> bool:
    try:
        for name, leaf in leaves:
            rules._no_collision(leaf.axes, "params", name)
        _check_leaves(leaves, sizes, rules)
    except ValueError:
        return False
    return True


def shardings(specs: Tree, mesh, rules: Rules) -> Tree:
    """A `NamedSharding` for each leaf of a tree of specs (parameters, optimiser state, averaged copies).

    A leaf without `.axes` must be a scalar, and is replicated.
    """
    import jax
    from jax.sharding import NamedSharding

    def one(path, leaf):
        name = _path_name(path)
        _require_axes(name, leaf)
        return NamedSharding(mesh, rules.spec_for(getattr(leaf, "axes", ()), "params", _title(name, leaf)))

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=_has_axes)


def batch_sharding(mesh, rules: Rules, axes: tuple[str, ...] = ("batch",)):
    """The `NamedSharding` of a batch's arrays: their first dimensions are `axes`, the rest is replicated."""
    from jax.sharding import NamedSharding

    return NamedSharding(mesh, rules.spec_for(axes, "activations", "a batch"))


@dataclass(frozen=True)
class Constrain:
    """`(x, logical axes) -> x`, spread over the mesh by the activation rules. Equal and hashable by value (static)."""

    mesh: Any
    rules: Rules

    def __call__(self, x, axes: tuple[str | None, ...]):
        if self.mesh.size == 1:
            return x
        import jax
        from jax.sharding import NamedSharding

        if x.ndim != len(axes):
            raise ValueError(f"an activation of shape {x.shape} needs {x.ndim} logical axes, got {axes}")
        spec = self.rules.spec_for(axes, "activations", f"an activation {list(x.shape)}")
        context = jax.sharding.get_abstract_mesh()
        if context.empty:
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))
        # Inside a shard_map that is manual over some axes (a pipeline's, a ring's): x is already a shard along those.
        manual = set(context.manual_axes)
        left = [tuple(a for a in _row(entry) if a not in manual) or None for entry in spec]
        return jax.lax.with_sharding_constraint(x, NamedSharding(context, jax.sharding.PartitionSpec(*left)))


def constrain(mesh, rules: Rules) -> Constrain:
    """What a model calls to say how an activation is spread; the identity on one device."""
    return Constrain(mesh, rules)


def named(specs: Tree) -> Iterator[tuple[str, Any]]:
    """`("layers/attention/query/kernel", leaf)` in tree order; scalars without axes are left out."""
    import jax

    for path, leaf in jax.tree_util.tree_flatten_with_path(specs, is_leaf=_has_axes)[0]:
        name = _path_name(path)
        _require_axes(name, leaf)
        if _has_axes(leaf):
            yield name, leaf


def itemsize(dtype: Any) -> int:
    """Bytes of one element; knows bfloat16 and the other dtypes of ml_dtypes."""
    import jax.numpy as jnp

    return jnp.dtype(dtype).itemsize


def _has_axes(leaf) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "axes")


def _require_axes(name: str, leaf) -> None:
    if not _has_axes(leaf) and getattr(leaf, "shape", ()) != ():
        raise ValueError(f"{name} {list(leaf.shape)} has no logical axes; only a scalar can do without")


def _title(name: str, leaf) -> str:
    return f"{name} {list(getattr(leaf, 'shape', ()))}"


def _path_name(path) -> str:
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)
