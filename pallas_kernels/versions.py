"""What differs between releases of JAX and Pallas, and what the trace in hand is for. Nothing else here asks for it."""

from __future__ import annotations

import jax
import jax.extend.backend
from jax.sharding import AxisType

from jaxpar.pallas_kernels.varying import varies_over

SAME = {"gpu": "cuda"}
"""Names that JAX uses for one platform in different places."""


def described():
    """The device that the mesh in scope describes (`jax.sharding.AbstractDevice`), or None.

    A mesh of real devices, or of a slice that is not there, describes them inside of `jax.set_mesh` and `shard_map`;
    `jax.sharding.use_abstract_mesh` with an `AbstractDevice` does so on any machine. JAX keeps traces made for
    different ones apart.
    """
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def platforms() -> tuple[str, ...]:
    """What the trace in hand may be lowered for ("cpu", "cuda", "tpu"): the described device's, or all of this process."""
    device = described()
    found = jax.extend.backend.backends() if device is None else [device.platform]
    return tuple(dict.fromkeys(SAME.get(name, name) for name in found))


def device_kind(platform: str) -> str | None:
    """The kind of device that a kernel of this platform would run on, for instance "TPU v5 lite"; None where unknown."""
    device = described()
    if device is not None:
        return device.device_kind if SAME.get(device.platform, device.platform) == platform else None
    if platform not in jax.extend.backend.backends():
        return None
    return jax.local_devices(backend=platform)[0].device_kind


def processors(platform: str) -> int | None:
    """The processors of the device that a kernel of this platform would run on: 132 of an H100; None where unknown."""
    device = described()
    if device is not None:
        return device.num_cores if SAME.get(device.platform, device.platform) == platform else None
    if platform not in jax.extend.backend.backends():
        return None
    return jax.local_devices(backend=platform)[0].core_count


def split_by_compiler() -> bool:
    """Whether the compiler may split over devices what is traced now, which it cannot do with a Mosaic kernel.

    It does not where all axes of the mesh in scope are manual (inside a `shard_map`), or where there is one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return described() is None and jax.device_count() > 1
    return mesh.size > 1 and any(kind != AxisType.Manual for kind in mesh.axis_types)


def out_shape(shape, dtype, *arrays) -> jax.ShapeDtypeStruct:
    """A kernel's output, which differs over the mesh axes that any of these inputs differs over."""
    axes = frozenset().union(*map(varies_over, jax.tree.leaves(arrays)))
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    if not hasattr(jax.sharding, "ManualAxisType"):
        # Before JAX 0.10.
        return jax.ShapeDtypeStruct(shape, dtype, vma=axes)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=axes))
