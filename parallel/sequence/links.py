"""What joins the devices of a sequence axis, by the kind of device: what `choose` decides with. Free of JAX."""

from __future__ import annotations

from dataclasses import replace

from jaxpar.parallel.sequence.choose import Links

# Bytes a second of one link in one direction.
# TPU: Google Cloud's "System architecture" pages (bidirectional bandwidth of a chip over its links, both ways) and "How
# to Scale Your Model" (Austin et al. 2025), ch. 2. NVIDIA: the data sheets' NVLink bandwidth, which counts both ways.
TORUS: tuple[tuple[str, float], ...] = (
    ("TPU v3", 100e9),
    ("TPU v4", 45e9),
    ("TPU v5 lite", 45e9),
    ("TPU v5e", 45e9),
    ("TPU v5", 90e9),
    ("TPU v6", 90e9),
    ("TPU", 45e9),  # kinds that are not listed: as the slowest of these
)
SWITCHED: tuple[tuple[str, float], ...] = (
    ("GB200", 900e9),
    ("B200", 900e9),
    ("GH200", 450e9),
    ("H200", 450e9),
    ("H100", 450e9),
    ("H800", 200e9),
    ("A100", 300e9),
    ("A800", 200e9),
)
NETWORK = 50e9
"""Between hosts with NVIDIA GPUs: one InfiniBand NDR adapter (400 Gbit/s) for each GPU."""
OTHER = 16e9
"""Of what is not in the tables (a CPU's devices, cards on PCIe): the order of magnitude of PCIe 4.0 with 8 lanes. Kinds
are then told apart by how much they send and how often they wait, which this number does not change."""


def links_of(device_kind: str, inner: int, devices: int, flops: float | None = None) -> Links:
    """The links along a sequence axis of so many devices.

    Args:
      device_kind: `jax.Device.device_kind`.
      inner: neighbours on the axis that are in one host; at most `devices`.
      flops: operations a second of a device, behind which a ring hides its messages. None: unknown, it hides nothing.
    """
    words = device_kind.lower()
    for name, bandwidth in TORUS:
        if name.lower() in words:
            return Links(bandwidth, flops=flops)
    inside = next((b for name, b in SWITCHED if name.lower() in words), None)
    if inside is None:
        return Links(OTHER, all_pairs=True, flops=flops)
    links = Links(inside, all_pairs=True, flops=flops)
    if inner >= devices:
        return links
    return replace(links, bandwidth=NETWORK, latency=5e-6, inner=inner, inner_bandwidth=inside)
