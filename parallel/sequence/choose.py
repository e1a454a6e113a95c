"""Which kind of sequence attention suits: bytes on each link, and a rule. Free of JAX.

Letters: N devices, t = T / N tokens on each, h query heads, g key/value heads, K head size, e bytes of an element; d_q =
h·K and d_kv = g·K. A device's link carries data up the ring and down it at the same time.

    a forward pass                  up                        down
    ring, rsa                       (N-1)·2·t·d_kv·e          0
    ring_bidirectional              (N-1)·t·d_kv·e            (N-1)·t·d_kv·e
    tokenring                       (N-1)·t·d_q·e             (N-1)·t·(d_q·e + 4·h)
    ulysses (of what is sent)       (N-1)/N·t·(2·d_q + 2·c·d_kv)·e + (N-1)/N·t·4·h,  c = copies of each key head

The busier direction counts. TokenRing's (d_q) is below the plain ring's (2·d_kv) only where h < 2·g, so it does not pay
with grouped queries; and a ring in both directions (d_kv) is never behind it, for any heads. TokenRing's way back goes
j hops at step j: on a torus each of them costs a link, N(N-1)/2 in all; only with links between all pairs does it cost
one each. Backward, every ring moves keys and values once more, and their float32 gradients; Ulysses does the same again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxpar.parallel.mesh import did_you_mean
from jaxpar.parallel.sequence.layouts import Layout

KINDS = ("ring", "ring_bidirectional", "rsa", "tokenring", "ulysses", "hybrid")
RINGS = ("ring", "ring_bidirectional", "rsa", "tokenring")


@dataclass(frozen=True)
class Workload:
    """One attention call over all devices of the sequence axis, for each row of a device's batch.

    Attributes:
      length: T, tokens of a whole row.
      heads, kv_heads: of a device (after a tensor axis has taken its share).
      head_size: K.
      devices: N.
      itemsize: e, bytes of an element of q, k and v.
      batch: rows on each device.
      causal: whether half of the work is masked away.
    """

    length: int
    heads: int
    kv_heads: int
    head_size: int
    devices: int
    itemsize: int = 2
    batch: int = 1
    causal: bool = True

    def __post_init__(self):
        Layout("contiguous", self.devices, self.length)
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads are no multiple of {self.kv_heads} key/value heads")

    @property
    def local(self) -> int:
        """Rows times tokens on a device."""
        return self.batch * self.length // self.devices

    @property
    def forward_flops(self) -> float:
        """Of one device: q·k and weights·v, half of it where the mask is causal and the layout balances it."""
        whole = 4 * self.local * self.length * self.heads * self.head_size
        return whole / 2 if self.causal else whole


@dataclass(frozen=True)
class Links:
    """What joins the devices of the sequence axis.

    Attributes:
      bandwidth: bytes a second of one link in one direction.
      latency: seconds that a message takes besides.
      all_pairs: a direct link (or a switch) between any two devices, as against a ring or torus.
      flops: operations a second of a device in attention; what a ring hides its messages behind. None: hides nothing.
      inner, inner_bandwidth: how many devices share faster links (a host), and the speed of those; for the hybrid.
    """

    bandwidth: float
    latency: float = 2e-6
    all_pairs: bool = False
    flops: float | None = None
    inner: int = 1
    inner_bandwidth: float | None = None


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends in a pass.

    Attributes:
      up, down: to the next device and to the one before; for an all-to-all, half each.
      down_hops: link crossings of the data sent down, over what is sent: 1 for neighbours.
      messages: rounds that wait for each other.
    """

    up: float
    down: float
    down_hops: float = 1.0
    messages: int = 0

    @property
    def total(self) -> float:
        """Bytes that the device sends."""
        return self.up + self.down


def bytes_per_link(kind: str, work: Workload, *, backward: bool = False) -> Traffic:
    """What a device sends in one forward (or backward) pass of a kind; the table of the module.

    Segment labels are left out (4 bytes a token, against 2·d_kv·e).

    Raises:
      ValueError: an unknown kind, the hybrid (ask for its two parts), or heads that Ulysses cannot share out.
    """
    n, t, e = work.devices, work.local, work.itemsize
    d_q, d_kv = work.heads * work.head_size, work.kv_heads * work.head_size
    if kind in RINGS and backward:
        moved = 2 * t * d_kv * (e + 4) * (n - 1)
        both = kind == "ring_bidirectional"
        return Traffic(moved / 2 if both else moved, moved / 2 if both else 0, messages=n)
    match kind:
        case "ring":
            return Traffic((n - 1) * 2 * t * d_kv * e, 0, messages=n - 1)
        case "rsa":
            return Traffic((n - 1) * 2 * t * d_kv * e, 0, messages=2 * (n - 1))
        case "ring_bidirectional":
            return Traffic((n - 1) * t * d_kv * e, (n - 1) * t * d_kv * e, messages=n - 1)
        case "tokenring":
            back = (n - 1) * t * (d_q * e + 4 * work.heads)
            return Traffic((n - 1) * t * d_q * e, back, down_hops=n / 2, messages=n)
        case "ulysses":
            key_copies = copies(work.heads, work.kv_heads, n)
            sent = t * (2 * d_q * e + 2 * key_copies * d_kv * e + 4 * work.heads) * (n - 1) / n
            return Traffic(sent / 2, sent / 2, down_hops=max(1.0, n / 4), messages=2)
    known = [k for k in KINDS if k != "hybrid"]
    raise ValueError(f"no traffic for the kind {kind!r}{did_you_mean(kind, known)}; kinds: {', '.join(known)}")


@dataclass(frozen=True)
class Choice:
    """The kind that a rule picked.

    Attributes:
      kind: one of KINDS.
      inner: devices of the Ulysses axis, for the hybrid; else 1 (a ring) or all (Ulysses).
      seconds: exposed communication of a forward pass by kind; kinds that cannot run are absent.
      reason: one sentence.
    """

    kind: str
    inner: int
    seconds: dict[str, float]
    reason: str


def choose(work: Workload, links: Links) -> Choice:
    """The kind with the least communication that is not hidden behind computation, forward.

    A ring hides a message behind the block that is computed meanwhile; an all-to-all hides behind nothing. Equal kinds
    go to the simpler one, in the order of KINDS. Ring Self-Attention is never picked: it holds whole rows of scores.
    """
    seconds = {kind: _exposed(kind, work, links) for kind in ("ring", "ring_bidirectional", "tokenring")}
    why = {}
    if work.heads % work.devices == 0:
        seconds["ulysses"] = _exposed("ulysses", work, links)
    else:
        why["ulysses"] = f"Ulysses cannot share {work.heads} heads among {work.devices} devices"
    if 1 < links.inner < work.devices and work.devices % links.inner == 0 and work.heads % links.inner == 0:
        seconds["hybrid"] = _exposed_hybrid(work, links)
    kind = min(seconds, key=lambda k: (seconds[k], KINDS.index(k)))
    if 2 * work.kv_heads <= work.heads:
        why["tokenring"] = f"TokenRing does not pay with {work.heads} query heads over {work.kv_heads} key heads"
    text = ", ".join(f"{k} {1e6 * s:.1f} µs" for k, s in sorted(seconds.items(), key=lambda x: x[1]))
    inner = {"hybrid": links.inner, "ulysses": work.devices}.get(kind, 1)
    return Choice(kind, inner, seconds, "; ".join([f"exposed communication: {text}", *why.values()]))


def _exposed(kind: str, work: Workload, links: Links, bandwidth: float | None = None) -> float:
    """Seconds of a forward pass in which a device waits for data."""
    if work.devices == 1:
        return 0.0
    traffic = bytes_per_link(kind, work)
    hops = 1.0 if links.all_pairs else traffic.down_hops
    if kind == "ulysses":
        # Down and up are one message here; with links between all pairs the two halves go at once.
        busiest = traffic.up * hops
    else:
        busiest = max(traffic.up, traffic.down * hops)
    taken = busiest / (bandwidth or links.bandwidth) + traffic.messages * links.latency
    if kind == "ulysses" or links.flops is None:
        return taken
    # N - 1 of the N blocks have a message beside them.
    hidden = work.forward_flops / links.flops * (work.devices - 1) / work.devices
    return max(0.0, taken - hidden)


def _exposed_hybrid(work: Workload, links: Links) -> float:
    """Ulysses over the inner devices, then a ring of the groups with their share of the heads."""
    inner, outer = links.inner, work.devices // links.inner
    of = lambda **changed: Workload(**{**vars(work), **changed})
    exchange = of(devices=inner, length=work.length // outer)
    key_heads = work.kv_heads * copies(work.heads, work.kv_heads, inner) // inner
    ring = of(devices=outer, heads=work.heads // inner, kv_heads=key_heads)
    return _exposed("ulysses", exchange, links, links.inner_bandwidth) + _exposed("ring", ring, links)


def copies(heads: int, kv_heads: int, devices: int, what: str = "Ulysses") -> int:
    """How often each key head is repeated, so that every device has the key heads of its share of the query heads.

    Raises ValueError where the query heads cannot be shared out.
    """
    if heads % devices:
        fits = max(n for n in range(1, devices) if heads % n == 0)
        raise ValueError(
            f"{what} over {devices} devices needs a multiple of {devices} query heads, got {heads} ({kv_heads} "
            f"key/value heads); nearest that works: {fits} device{'s' * (fits > 1)}"
            + (", or a hybrid with a ring" if what == "Ulysses" else "")
        )
    return math.lcm(kv_heads, devices) // kv_heads
