"""The mesh: how many devices lie along each axis, and which device stands where. Free of JAX at import.

A mesh has *axes*; a tensor has *dimensions*. `jaxpar.parallel.rules` says which dimension lies on which axis.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

AXES = ("data", "stage", "fsdp", "sequence", "tensor")
"""Every mesh axis, outermost first. Neighbours on the last axis are neighbours on the network, so the order is by how
often an axis communicates, and how much of that lies on the critical path:

    data       once a step: all-reduce of the gradients
    stage      once a microbatch and stage: an activation to the neighbour, and a gradient back
    fsdp       twice a layer: all-gather of its weights; once: reduce-scatter of its gradients; all of it prefetchable
    sequence   twice a layer: keys and values round the ring, beside the attention that they are for
    tensor     four times a layer: all-reduce of the activations, which the next matmul waits for

Every mesh has all of them (of size 1 where unused), so a PartitionSpec made for one mesh is valid on each.
"""

Size = int | Literal["rest"]


@dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis. One axis may take the "rest": all devices that the others leave.

    Attributes:
      data: copies of the model; each sees other rows of the batch.
      stage: pipeline stages; each holds a part of the layers, and all rows of the batch pass through every one.
      fsdp: devices that share one copy's parameters and optimiser state (ZeRO-3); each sees other rows of the batch.
      sequence: devices that share each row's tokens (ring attention and its kind).
      tensor: devices that share each layer's heads, hidden units and vocabulary; all see the same rows.
    """

    data: Size = 1
    stage: Size = 1
    fsdp: Size = 1
    sequence: Size = 1
    tensor: Size = 1

    def __post_init__(self):
        for axis, size in self._items():
            if size == "rest":
                continue
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(
                    f"mesh axis {axis} = {size!r} is not a number of devices; give at least 1, or 'rest' for all that "
                    "the other axes leave"
                )
        rest = [axis for axis, size in self._items() if size == "rest"]
        if len(rest) > 1:
            raise ValueError(f"mesh axes {' and '.join(rest)} are both 'rest'; only one can take what the others leave")

    def _items(self) -> list[tuple[str, Size]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self)]

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """`"data=2,tensor=rest"` as a MeshConfig. An empty text is one device."""
        sizes: dict[str, Size] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            axis, equals, value = (p.strip() for p in part.partition("="))
            if not equals:
                raise ValueError(f"mesh {text!r}: {part!r} is not axis=size; write for instance data=2,tensor=4")
            if axis not in AXES:
                raise ValueError(
                    f"mesh {text!r} has no axis {axis!r}{did_you_mean(axis, AXES)}; axes: {', '.join(AXES)}"
                )
            if axis in sizes:
                raise ValueError(f"mesh {text!r} gives axis {axis} twice: {sizes[axis]} and {value}; keep one")
            if value != "rest" and not re.fullmatch(r"[+-]?\d+", value):
                raise ValueError(f"mesh {text!r}: the size of {axis} is {value!r}; give a whole number, or 'rest'")
            sizes[axis] = "rest" if value == "rest" else int(value)
        return cls(**sizes)

    @property
    def sizes(self) -> dict[str, int]:
        """`{axis: size}` in the order of AXES. Raises ValueError while an axis is still "rest" (see `fit`)."""
        for axis, size in self._items():
            if size == "rest":
                raise ValueError(f"mesh axis {axis} is 'rest': its size is known once fit(devices) was called")
        return dict(self._items())

    def fit(self, devices: int) -> MeshConfig:
        """The same mesh with "rest" filled in. Raises ValueError unless it takes exactly `devices` devices."""
        known = math.prod(size for _, size in self._items() if size != "rest")
        rest = next((axis for axis, size in self._items() if size == "rest"), None)
        if rest is None and known == devices:
            return self
        if rest is not None and devices % known == 0 and devices >= known:
            return replace(self, **{rest: devices // known})
        equation = f"{self} = {known}" if rest is None else f"{self}"
        relation = f"!= {devices} devices" if rest is None else f"does not fit {devices} devices"
        why = "" if rest is None else f" ({devices} / {known} is no whole number)"
        raise ValueError(f"mesh {equation} {relation}{why}; nearest that fits: {self._nearest(devices)}")

    def _nearest(self, devices: int) -> MeshConfig:
        """The factorisation of `devices` that changes the fewest axes, then by the least, then the outermost."""

        def distance(sizes):
            by = [
                0.0 if want == "rest" else abs(math.log(got / want))
                for got, (_, want) in zip(sizes, self._items(), strict=True)
            ]
            changed = [b > 0 for b in by]
            return sum(changed), round(sum(by), 6), changed[::-1]

        best = min(factorisations(devices, len(AXES)), key=distance)
        return MeshConfig(**dict(zip(AXES, best, strict=True)))

    def __str__(self) -> str:
        return product(dict(self._items()))


assert tuple(f.name for f in fields(MeshConfig)) == AXES, "MeshConfig's fields and AXES must agree, also in order"


def factorisations(n: int, parts: int) -> Iterable[tuple[int, ...]]:
    """Every way to write n as an ordered product of `parts` whole numbers: (8, 3) gives ten."""
    if parts == 1:
        return [(n,)]
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return [(d, *rest) for d in divisors for rest in factorisations(n // d, parts - 1)]


def product(sizes: Mapping[str, Size]) -> str:
    """`data(2) × tensor(4)`, as it stands in messages: axes of size 1 are left out, unless all are."""
    used = {axis: size for axis, size in sizes.items() if size != 1} or dict(list(sizes.items())[:1])
    return " × ".join(f"{axis}({size})" for axis, size in used.items())


def mesh_sizes(mesh: Any) -> dict[str, int]:
    """`{axis: size}` of a jax Mesh, a MeshConfig, or a mapping: checks need sizes only, no devices."""
    if isinstance(mesh, MeshConfig):
        return mesh.sizes
    return dict(mesh if isinstance(mesh, Mapping) else mesh.shape)


def make_mesh(cfg: MeshConfig, devices: list | None = None):
    """A `jax.sharding.Mesh` over `devices` (default: all devices of all processes), with every axis of AXES.

    Devices are placed so that inner axes use the fast links: along the torus on TPU, inside a host on GPU. Where the
    devices form several slices (joined by a slower network), the outermost axes run across them. Every process must
    call this with the same arguments. Axes are of type Auto: the partitioner (GSPMD) decides what is not constrained.

    Raises ValueError where the mesh and the number of devices disagree, or slices would split an inner axis.
    """
    import jax
    from jax.experimental import mesh_utils
    from jax.sharding import AxisType, Mesh

    devices = list(jax.devices() if devices is None else devices)
    cfg = cfg.fit(len(devices))
    shape = tuple(cfg.sizes.values())
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    across = over_slices(cfg.sizes, slices)
    within = tuple(size // n for size, n in zip(shape, across, strict=True))
    return Mesh(mesh_utils.create_hybrid_device_mesh(within, across, devices), AXES, axis_types=types)


def over_slices(sizes: Mapping[str, int], slices: int) -> tuple[int, ...]:
    """How many slices lie along each axis, outermost axes first: ({data: 4, fsdp: 4, tensor: 1}, 8) -> (4, 2, 1).

    Raises ValueError where that would put a slice boundary across the sequence or tensor axis.
    """
    left, across = slices, []
    for axis, size in sizes.items():
        n = 1 if axis in ("sequence", "tensor") else math.gcd(size, left)
        across.append(n)
        left //= n
    if left > 1:
        raise ValueError(
            f"mesh {product(sizes)} cannot be laid over {slices} slices: data × stage × fsdp must be a multiple of "
            f"{slices}, because sequence and tensor collectives are too frequent for the network between slices"
        )
    return tuple(across)


def fake_devices(n: int) -> None:
    """Make this process see `n` CPU devices. Call it before anything asks JAX for a device.

    Raises ValueError where n < 1, RuntimeError where JAX's backends have started already.
    """
    if n < 1:
        raise ValueError(f"{n} fake devices asked for; give at least 1")
    bridge = sys.modules.get("jax._src.xla_bridge")
    if bridge is not None and bridge.backends_are_initialized():
        import jax

        raise RuntimeError(
            f"{n} fake devices cannot be made: JAX has started with {jax.device_count()} {jax.default_backend()} "
            "device(s) already; call fake_devices before the first use of JAX (in a notebook: restart the kernel first)"
        )
    flag = "--xla_force_host_platform_device_count"
    others = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(flag + "=")]
    os.environ["XLA_FLAGS"] = " ".join([*others, f"{flag}={n}"])
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # read at import: too late for the environment, in time for the configuration
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'tensor'?)`, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
