"""`explain`: where every parameter lies, what a device holds, and what a step sends.

The notation is that of "How to Scale Your Model" (Austin et al. 2025, ch. 3): `[L, D_fsdp, H_tensor, K]` is a tensor
whose dimension D lies on mesh axis fsdp, and H on tensor.

The collectives derive from the rules alone, so that they can be read before anything runs:

- A parameter's mesh axis that the activation rules give the same logical axis *stays*: the product is computed in
  shards (tensor parallelism). Any other is *gathered* before use, in the forward and again in the backward pass (FSDP);
  a table that is only looked up is not needed backward.
- A gradient is summed over the axes of the batch: a reduce-scatter over those that the parameter is gathered over, an
  all-reduce over the rest.
- A kernel that sums over a dimension which stays ([H_tensor, K, D]: heads come before embed) leaves partial sums: an
  all-reduce of the activation [B, T, D] in the forward pass. One that spreads ([D, H_tensor, K]) does so in the
  backward pass, once for all kernels that read the same input (XLA:CPU does not merge these: one for each kernel). Where
  a run spreads the tokens between branches, it is a reduce-scatter and an all-gather instead, or the hops of a ring
  (`jaxpar.parallel.tensor.cost`), and gradients of norms and biases are summed over `tensor` too.
- A layer on `stage` is used where it lies, and nothing gathers it. What travels is each microbatch's
  [B, T, D] once to the next stage, as many of them as the residual operator's state holds, and gradients back.
- Tokens on `sequence` need the keys and values of the others: these go round a ring, in the forward and again in the
  backward pass, and their float32 gradients with them. Other kinds of attention send other amounts
  (`jaxpar.parallel.sequence.choose`).

Left out: sums of scalars and the softmax over a sharded vocabulary, a few bytes a token; and of a pipeline the ticks in
which a stage idles, more hops where a stage has several parts of the layers, weights that are gathered again for each
microbatch, and sums over `stage` for the tensors that every stage holds. The compiler may do better (neighbouring passes share one gather) or worse (the gradient of a
looked-up table is summed whole, not scattered).
Pass a compiled step to see what the compiler made of it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from jaxpar.parallel.collectives import Collective, count
from jaxpar.parallel.mesh import mesh_sizes, product
from jaxpar.parallel.rules import Rules, itemsize, named
from jaxpar.parallel.tensor.config import TENSOR, TensorConfig
from jaxpar.parallel.tensor.cost import sends

Tree = Any
LETTERS = {
    "layers": "L",
    "embed": "D",
    "heads": "H",
    "kv_heads": "G",
    "head_size": "K",
    "mlp": "F",
    "vocabulary": "V",
    "batch": "B",
    "length": "T",
}
SHORT = {"all-gather": "AG", "reduce-scatter": "RS", "all-reduce": "AR", "collective-permute": "CP"}
STAGE, SEQUENCE = "stage", "sequence"


@dataclass(frozen=True)
class Explanation:
    """Attributes: `text`, a table for people; `record`, the same as JSON-able dicts and lists, in bytes."""

    text: str
    record: dict

    def __str__(self) -> str:
        return self.text


def notation(axes, rules: Rules, sizes: dict[str, int], shape=None, kind="params") -> str:
    """`[L, D_fsdp, H_tensor, K]`. Axes of size 1 are left out; a dimension without a name shows its size."""
    parts = []
    for i, axis in enumerate(axes):
        letter = LETTERS.get(axis, axis if shape is None or axis not in (None, "norm") else str(shape[i]))
        on = [a for a in rules.mesh_axes(axis, kind) if sizes[a] > 1]
        parts.append(letter if not on else f"{letter}_{on[0]}" if len(on) == 1 else f"{letter}_{{{','.join(on)}}}")
    return f"[{', '.join(parts)}]"


def local_bytes(leaf, rules: Rules, sizes: dict[str, int]) -> int:
    """Bytes of one tensor on one device."""
    shards = math.prod(sizes[a] for axis in leaf.axes for a in rules.mesh_axes(axis))
    return math.prod(leaf.shape) * itemsize(leaf.dtype) // shards


def explain(
    specs: Tree,
    mesh: Any,
    rules: Rules,
    *,
    rows: int | None = None,
    length: int | None = None,
    microbatches: int = 1,
    tensor: TensorConfig = TensorConfig(),
    compute_dtype: str = "float32",
    optimiser: Tree | None = None,
    wire: int | None = None,
    compiled: Any = None,
) -> Explanation:
    """Explain a layout. No device is needed; check it first with `jaxpar.parallel.rules.check`.

    Args:
      specs: the parameters' specs (`.shape`, `.axes`, `.dtype`).
      mesh: a Mesh, a MeshConfig, or a mapping `{axis: size}`.
      rows, length: the global batch, in rows and tokens; without them activation collectives are left out.
      microbatches: into how many a pipeline cuts these rows. Each hop is smaller the more there are; their sum is not.
      tensor: how products over the tensor axis are computed.
      compute_dtype: the dtype in which weights are gathered and gradients summed.
      optimiser: the specs of the optimiser's state. None: two float32 moments for each parameter (AdamW).
      wire: bytes of a token that cross from stage to stage. None: one vector of the model's width.
      compiled: a compiled step (`jit(f).lower(...).compile()`) or its text: its collectives are counted.
    """
    sizes = mesh_sizes(mesh)
    leaves = list(named(specs))
    tied = not any(leaf.axes == ("embed", "vocabulary") for _, leaf in leaves)
    by_name = {name: weight_collectives(name, leaf, rules, sizes, compute_dtype, tied, tensor) for name, leaf in leaves}
    activations = []
    if rows is not None and length is not None:
        activations = [
            *activation_collectives(leaves, rules, sizes, rows, length, compute_dtype, tied, tensor),
            *ring_collectives(leaves, rules, sizes, rows, length, compute_dtype),
            *stage_collectives(leaves, rules, sizes, rows, length, compute_dtype, microbatches, wire),
        ]
    params = sum(local_bytes(leaf, rules, sizes) for _, leaf in leaves)
    moments = 2 * sum(local_bytes(leaf, rules, sizes) // itemsize(leaf.dtype) * 4 for _, leaf in leaves)
    if optimiser is not None:
        moments = sum(local_bytes(leaf, rules, sizes) for _, leaf in named(optimiser))
    record = {
        "mesh": sizes,
        "parameters": [_row(name, leaf, rules, sizes, by_name[name]) for name, leaf in leaves],
        "activations": [c.record() for c in activations],
        "bytes_per_device": {"parameters": params, "gradients": params, "optimiser": moments},
        "sent_bytes_per_step": sum(c.sent * c.times for c in itertools.chain(activations, *by_name.values())),
        "compiled": None,
    }
    text = _table(leaves, record, by_name) + "\n\n" + _totals(leaves, record, sizes, activations, tensor)
    if compiled is not None:
        counted = count(compiled if isinstance(compiled, str) else compiled.as_text(), sizes)
        record["compiled"] = {
            "collectives": [c.record() for c in counted.collectives],
            "unknown_loops": counted.unknown_loops,
            "branches": counted.branches,
        }
        text += "\n\n" + _compiled(counted)
    return Explanation(text, record)


def weight_collectives(
    name: str, leaf, rules: Rules, sizes, dtype: str, tied: bool, tensor: TensorConfig = TensorConfig()
) -> list[Collective]:
    """What one parameter costs a step: gathers forward and backward, and the sum of its gradient over the batch."""
    stacked = bool(leaf.axes) and leaf.axes[0] == "layers"
    times = _layers(leaf, rules, sizes)
    element = itemsize(dtype) if len(leaf.shape) - stacked > 1 else itemsize(leaf.dtype)
    gathered, stay = _split(leaf, rules, sizes)
    batch = _batch_axes(rules, sizes)
    if tensor.products != "whole" and sizes[TENSOR] > 1:
        batch = (*batch, TENSOR)  # over which the tokens lie that a norm or a bias sees
    whole = math.prod(leaf.shape[stacked:]) * element // math.prod(sizes[a] for a in stay)
    part = whole // math.prod(sizes[a] for a in gathered)
    scatter = tuple(a for a in gathered if a in batch)
    reduce = tuple(a for a in batch if a not in gathered and a not in stay)

    def one(op, axes, nbytes, n):
        return Collective(op, axes, math.prod(sizes[a] for a in axes), nbytes, n, name)

    found = []
    if gathered:
        looked_up = leaf.axes in (("vocabulary", "embed"), (None, "embed")) and not (tied and leaf.axes[0])
        found.append(one("all-gather", gathered, whole, times if looked_up else 2 * times))
    if scatter:
        # Rows in two halves have a gradient each, but one gather of the weights.
        halves = tensor.parts(sizes) if stacked and "embed" in leaf.axes and sizes.get(STAGE, 1) == 1 else 1
        found.append(one("reduce-scatter", scatter, whole, times * halves))
    if reduce:
        found.append(one("all-reduce", reduce, part, times))
    return found


def activation_collectives(
    leaves: list, rules: Rules, sizes, rows, length, dtype, tied: bool, tensor: TensorConfig = TensorConfig()
) -> list[Collective]:
    """Collectives of [B, T, D] around kernels with a dimension that stays sharded, forward and backward."""
    found: dict[tuple, Collective] = {}
    parts = tensor.parts(sizes)
    for name, leaf in leaves:
        _, stay = _split(leaf, rules, sizes)
        if not stay or "embed" not in leaf.axes:
            continue
        width = leaf.axes.index("embed")
        spreads = width < min(i for i, axis in enumerate(leaf.axes) if set(rules.mesh_axes(axis)) & set(stay))
        numbers = _tokens(rules, sizes, rows, length) * leaf.shape[width]
        group = math.prod(sizes[a] for a in stay)
        # Kernels side by side (query, key, value) read one input, and their gradients are added up before they are summed.
        where = ("/".join(name.split("/")[:-2]) or name) if spreads else name
        in_layers = leaf.axes[0] == "layers"
        uses = [(where, spreads)]
        if tied and "vocabulary" in leaf.axes and not spreads:
            uses.append((f"{name} as the output projection", True))
        for where, spreads in uses:
            for i, send in enumerate(sends(tensor, spreads=spreads, in_layers=in_layers)):
                nbytes = numbers * itemsize("float32" if send.precise else dtype) // parts
                times = parts * _layers(leaf, rules, sizes)
                if send.op == "collective-permute":
                    nbytes, times = nbytes // group, times * (group - 1)
                what = f"{send.which} {where}"
                found[what, i, stay] = Collective(send.op, stay, group, nbytes, times, what)
    return list(found.values())


def ring_collectives(leaves: list, rules: Rules, sizes, rows, length, dtype) -> list[Collective]:
    """Keys and values round the ring of the devices that share a row's tokens: N - 1 hops, each of one device's share.

    The bytes are those of `jaxpar.parallel.sequence.choose.bytes_per_link` for the kind "ring".
    """
    devices = sizes.get(SEQUENCE, 1)
    if devices == 1 or SEQUENCE not in rules.mesh_axes("length", "activations"):
        return []
    found = []
    for name, leaf in leaves:
        if "embed" not in leaf.axes or "kv_heads" not in leaf.axes[leaf.axes.index("embed") :]:
            continue  # no kernel that makes keys or values
        made = list(zip(leaf.axes, leaf.shape, strict=True))[leaf.axes.index("embed") + 1 :]
        numbers = _tokens(rules, sizes, rows, length) * math.prod(
            n // math.prod(sizes[a] for a in rules.mesh_axes(axis, "activations")) for axis, n in made
        )
        hops = (devices - 1) * _layers(leaf, rules, sizes)
        for what, element in (
            ("forward", itemsize(dtype)),
            ("backward", itemsize(dtype)),
            ("gradient of", itemsize("float32")),
        ):
            found.append(
                Collective("collective-permute", (SEQUENCE,), devices, numbers * element, hops, f"{what} {name}, ring")
            )
    return found


def stage_collectives(leaves: list, rules, sizes, rows, length, dtype, microbatches: int, wire) -> list[Collective]:
    """What a stage in the middle sends: each microbatch's activations to the next stage, and their gradients back."""
    stages = sizes.get(STAGE, 1)
    stacked = [leaf for _, leaf in leaves if STAGE in _placed(leaf, rules) and "embed" in leaf.axes]
    if stages == 1 or not stacked:
        return []
    width = stacked[0].shape[stacked[0].axes.index("embed")]
    nbytes = _tokens(rules, sizes, rows, length) // microbatches * (width * itemsize(dtype) if wire is None else wire)
    return [
        Collective("collective-permute", (STAGE,), stages, nbytes, microbatches, what)
        for what in ("forward to the next stage", "backward to the stage before")
    ]


def _tokens(rules: Rules, sizes, rows: int, length: int) -> int:
    """Tokens of the batch on one device."""
    return rows * length // math.prod(sizes[a] for a in _batch_axes(rules, sizes))


def _placed(leaf, rules: Rules) -> tuple[str, ...]:
    """The mesh axes along which whole layers lie, each used by the device that holds it."""
    return tuple(a for axis in leaf.axes if axis == "layers" for a in rules.mesh_axes(axis) if a == STAGE)


def _layers(leaf, rules: Rules, sizes) -> int:
    """How many layers of a stacked parameter a device uses; 1 of any other."""
    if not leaf.axes or leaf.axes[0] != "layers":
        return 1
    return leaf.shape[0] // math.prod(sizes[a] for a in _placed(leaf, rules))


def _split(leaf, rules: Rules, sizes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A parameter's mesh axes of more than one device: those it is gathered over before use, and those that stay.

    The stages of its layers are neither.
    """
    activations = dict(rules.activations)
    gathered, stay = [], []
    for axis in leaf.axes:
        for a in rules.mesh_axes(axis):
            if sizes[a] > 1 and not (axis == "layers" and a == STAGE):
                (stay if a in activations.get(axis, ()) else gathered).append(a)
    return tuple(gathered), tuple(stay)


def _batch_axes(rules: Rules, sizes) -> tuple[str, ...]:
    rows = rules.mesh_axes("batch", "activations") + rules.mesh_axes("length", "activations")
    return tuple(a for a in rows if sizes[a] > 1)


def _row(name, leaf, rules, sizes, collectives) -> dict:
    return {
        "name": name,
        "shape": list(leaf.shape),
        "axes": list(leaf.axes),
        "spec": [list(rules.mesh_axes(axis)) for axis in leaf.axes],
        "notation": name.split("/")[-1] + notation(leaf.axes, rules, sizes, leaf.shape),
        "bytes_per_device": local_bytes(leaf, rules, sizes),
        "collectives": [c.record() for c in collectives],
    }


def _table(leaves, record, by_name) -> str:
    head = ("parameter", "logical axes", "PartitionSpec", "a device", "collectives a step")
    rows = []
    for (name, _), row in zip(leaves, record["parameters"], strict=True):
        spec = ", ".join("+".join(axes) or "-" for axes in row["spec"])
        costs = ", ".join(f"{c.times} {SHORT[c.op]}({'+'.join(c.axes)})" for c in by_name[name])
        axes = row["notation"][row["notation"].index("[") :]
        rows.append((name, axes, f"P({spec})", size(row["bytes_per_device"]), costs or "-"))
    return table(head, rows, right=(3,))


def _totals(leaves, record, sizes, activations, tensor: TensorConfig) -> str:
    letters = {
        LETTERS[a]: (a, n) for _, leaf in leaves for a, n in zip(leaf.axes, leaf.shape, strict=True) if a in LETTERS
    }
    legend = ", ".join(f"{letter} {axis} = {n}" for letter, (axis, n) in letters.items())
    held = record["bytes_per_device"]
    devices = math.prod(sizes.values())
    lines = [
        legend,
        "AG all-gather, RS reduce-scatter, AR all-reduce, CP collective-permute, and the mesh axes they run over.",
        f"mesh: {product(sizes)} = {devices} device{'s' if devices > 1 else ''}",
        f"each device holds: parameters {size(held['parameters'])}, gradients {size(held['gradients'])}, "
        f"optimiser {size(held['optimiser'])}, together {size(sum(held.values()))}",
    ]
    if activations:
        rows = [
            (c.where, SHORT[c.op], str(c.times), size(c.nbytes), "+".join(c.axes), size(c.sent * c.times))
            for c in activations
        ]
        head = ("collectives of activations", "op", "a step", "each", "over", "sent")
        lines += ["", table(head, rows, right=(2, 3, 5)), *_assumed(activations, tensor)]
    lines.append(f"each device sends {size(record['sent_bytes_per_step'])} a step (ring algorithms)")
    return "\n".join(lines)


def _assumed(activations, tensor: TensorConfig) -> list[str]:
    """What the rules do not say, and these rows take for granted."""
    axes = {axis: c.times for c in activations for axis in c.axes}
    lines = []
    if TENSOR in axes and tensor.products == "sharded":
        lines.append(
            "over tensor: sharded leaves it to the partitioner, which may send more (on CPU it sums whole where these rows "
            "scatter); --compile counts what it does"
        )
    if SEQUENCE in axes:
        lines.append("over sequence: attention as a ring; other kinds send other amounts")
    if STAGE in axes:
        n = axes[STAGE]
        lines.append(
            f"over stage: a stage in the middle, {n} microbatch{'es' if n > 1 else ''}, one part of the layers each; "
            "without idle ticks, weights gathered again for each microbatch, and sums over stage for what every stage holds"
        )
    return lines


def _compiled(counted) -> str:
    groups: dict[tuple, list[Collective]] = {}
    for c in counted.collectives:
        groups.setdefault((c.op, c.axes), []).append(c)
    rows = [
        (
            op,
            "mixed" if axes is None else "+".join(axes) or "-",
            str(len(found)),
            str(sum(c.times for c in found)),
            size(sum(c.nbytes * c.times for c in found)),
            size(sum(c.sent * c.times for c in found)),
        )
        for (op, axes), found in sorted(groups.items(), key=lambda item: str(item[0]))
    ]
    text = table(
        ("compiled collective", "over", "in the program", "a step", "payload", "sent"), rows, right=(2, 3, 4, 5)
    )
    if counted.unknown_loops:
        text += f"\n{counted.unknown_loops} loop(s) of unknown length were counted as one pass"
    if counted.branches:
        text += f"\n{counted.branches} branches of conditionals were counted as if each always ran"
    return text


def table(head: tuple[str, ...], rows: list[tuple[str, ...]], right: tuple[int, ...] = ()) -> str:
    """Aligned columns with a ruled head; the columns in `right` are flush right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row):
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return " | ".join(cells).rstrip()

    return "\n".join([line(head), "-+-".join("-" * w for w in widths), *map(line, rows)])


def size(nbytes: int) -> str:
    """`1.5 MiB`."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{nbytes} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError
