"""The schedules, as orders of tasks. `make` finds one by name; each function states its source.

p devices, m microbatches, v chunks (virtual stages on a device), device s counted from 0.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from jaxpar.parallel.pipeline.greedy import greedy
from jaxpar.parallel.pipeline.tasks import Kind, Order, Path, Placement, Task, check_paths, positive, straight

F, B, BI, BW = Kind.F, Kind.B, Kind.BI, Kind.BW

WarmUp = Literal["least", "double"]
"""How many microbatches are let in before the first backward: as few as keep every device of 1F1B busy (p-1-s), or
twice as many. The double warm-up hides a message's way there and back, which is what ticks of one kind cost (`choose.py`).
"""

WARM_UPS: dict[str, tuple[WarmUp, ...]] = {name: ("least", "double") for name in ("1f1b", "checkfree+", "skippipe")}
"""The schedules that have both; all others have "least"."""


def gpipe(devices: int, microbatches: int) -> Order:
    """All forwards, then all backwards in reverse (Huang et al. 2019, "GPipe", figure 2c). Every device holds the
    activations of m microbatches; the bubble is (p-1)/m of the ideal time."""
    positive(devices=devices, microbatches=microbatches)
    rows = [
        [Task(F, s, i) for i in range(microbatches)] + [Task(B, s, i) for i in reversed(range(microbatches))]
        for s in range(devices)
    ]
    return _straight("gpipe", rows, Placement.round_robin(devices), microbatches)


def one_f_one_b(devices: int, microbatches: int, warm_up: WarmUp = "least") -> Order:
    """Each backward as soon as it can run (Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU
    Clusters", section 2.2.1: PipeDream-Flush). The bubble of GPipe, (p-1)/m of the ideal time, with activations of
    min(p-s, m) microbatches on device s; with the double warm-up of min(2(p-s)-1, m)."""
    positive(devices=devices, microbatches=microbatches)
    rows = []
    for s in range(devices):
        first = min(microbatches, (devices - 1 - s) * _factor(warm_up))
        forwards = [Task(F, s, i) for i in range(microbatches)]
        backwards = [Task(B, s, i) for i in range(microbatches)]
        rows.append(_alternate(forwards, backwards, first))
    return _straight("1f1b", rows, Placement.round_robin(devices), microbatches)


def interleaved(devices: int, microbatches: int, chunks: int = 2) -> Order:
    """Interleaved 1F1B (Narayanan et al. 2021, section 2.2.2): v chunks on a device, whose forwards and backwards take
    turns in groups of p microbatches. The bubble is (p-1)/(v·m) of the ideal time, for v times the messages.

    Raises:
      ValueError: m is not a multiple of p, or p is 1 with several chunks.
    """
    positive(devices=devices, microbatches=microbatches, chunks=chunks)
    if chunks > 1 and devices == 1:
        raise ValueError(f"{chunks} chunks on 1 device interleave with nothing; give at least 2 stages, or 1 chunk")
    if microbatches % devices:
        below, above = microbatches // devices * devices, -(-microbatches // devices) * devices
        nearest = f"{above}" if below == 0 else f"{below} or {above}"
        raise ValueError(
            f"interleaved 1F1B runs its chunks in groups of {devices} microbatches (one a stage), and {microbatches} is "
            f"no multiple of {devices}; nearest: {nearest} microbatches"
        )
    rows = []
    for s in range(devices):
        forwards, backwards = [], []
        for group in range(0, microbatches, devices):
            for c in range(chunks):
                batches = range(group, group + devices)
                forwards += [Task(F, c * devices + s, i) for i in batches]
                backwards += [Task(B, (chunks - 1 - c) * devices + s, i) for i in batches]
        first = min(len(forwards), 2 * (devices - 1 - s) + (chunks - 1) * devices)
        rows.append(_alternate(forwards, backwards, first))
    return _straight("interleaved", rows, Placement.round_robin(devices, chunks), microbatches)


def zb_h1(devices: int, microbatches: int) -> Order:
    """ZB-H1 (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.3, figure 2): weights' gradients fill the
    bubble of 1F1B; no more than p microbatches are held anywhere. The bubble is (p-1)·(F + Bi - Bw) seconds.

    Device s runs p-s forwards, then s times (Bi, F), then cycles of (Bi, Bw, F), leaving out what has run out.
    """
    positive(devices=devices, microbatches=microbatches)
    rows = []
    for s in range(devices):
        take = _Taker({0: s}, microbatches)
        for _ in range(devices - s):
            take(F)
        for _ in range(s):
            take(BI), take(F)
        while take.left():
            take(BI), take(BW), take(F)
        rows.append(take.tasks)
    return _straight("zb-h1", rows, Placement.round_robin(devices), microbatches)


def zb_v(devices: int, microbatches: int) -> Order:
    """ZB-V (Qi et al. 2024, "Pipeline Parallelism with Controllable Memory", section 3 and figure 2): two chunks in a V,
    so that the loss comes back to device 0 at once. With F = Bi = Bw no bubble but the p-1 ticks of a message's way, and
    no more held than 2p chunks, as much as 1F1B's first device.

    Where there are fewer than 2p-1 microbatches, those missing are left out of the order for 2p-1.
    """
    positive(devices=devices, microbatches=microbatches)
    m = max(microbatches, 2 * devices - 1)
    rows = []
    for s in range(devices):
        take = _Taker({0: s, 1: 2 * devices - 1 - s}, m)
        for _ in range(2 * (devices - s) - 1):
            take(F, 0)
        for _ in range(s):
            take(F, 1), take(F, 0)
        for _ in range(devices - s):
            take(F, 1), take(BI, 1), take(BW, 1)
        while take.left(F, 0) or take.left(F, 1):
            take(F, 0), take(BI, 0), take(BW, 0)
            take(F, 1), take(BI, 1), take(BW, 1)
        for _ in range(s):
            take(BI, 0), take(BI, 1)
        for _ in range(devices - s):
            take(BI, 0), take(BW, 0)
        while take.left(BW, 1):
            take(BW, 1)
        while take.left(BW, 0):
            take(BW, 0)
        rows.append(take.tasks)
    return _straight("zb-v", _only(rows, microbatches), Placement.v_shaped(devices), microbatches)


def dualpipe_v(devices: int, microbatches: int) -> Order:
    """DualPipe-V (DeepSeek-AI 2025, github.com/deepseek-ai/DualPipe, after Qi et al. 2024): DualPipe's steady state,
    where a forward of one chunk meets a backward of the other, on the V placement.

    Its gain on GPUs is that the pair's communication and computation overlap inside one device. A table has one action
    a tick and device: here the pair is a forward, then a backward. Where there are fewer than 2p microbatches, those
    missing are left out of the order for 2p.
    """
    positive(devices=devices, microbatches=microbatches)
    m = max(microbatches, 2 * devices)
    rows = []
    for s in range(devices):
        take = _Taker({0: s, 1: 2 * devices - 1 - s}, m)
        after = devices - 1 - s
        for _ in range(2 * after):
            take(F, 0)
        for _ in range(s + 1):
            take(F, 0), take(F, 1)
        for _ in range(after):
            take(BI, 1), take(BW, 1), take(F, 1)
        for _ in range(m - 2 * devices + s + 1):
            take(F, 0), take(B, 1), take(F, 1), take(B, 0)
        for _ in range(after):
            take(B, 1), take(F, 1), take(B, 0)
        # From the middle of what follows the backward is split: s + 1 of its 2(s + 1) halves, whichever chunk they have.
        late = []
        for k in range(2 * (s + 1)):
            chunk = 1 - k % 2
            kind = B if k <= s else BI
            task = take(kind, chunk)
            late += [task] * (kind is BI)
        for _ in range(after):
            take.append(late.pop(0), BW)
            late.append(take(BI, 0))
        for task in late:
            take.append(task, BW)
        rows.append(take.tasks)
    return _straight("dualpipe-v", _only(rows, microbatches), Placement.v_shaped(devices), microbatches)


def checkfree_plus(
    devices: int, microbatches: int, warm_up: WarmUp = "least", *, in_flight: int | None = None
) -> Order:
    """CheckFree+ (Blagoev et al. 2025, "All is Not Lost: LLM Recovery without Checkpoints", section 4.3): every second
    microbatch runs the first two stages in swapped order, and the last two, so that each learns its neighbour's work.

    With the least warm-up backward first and p + 2 microbatches in flight, with the double one forwards and backwards in
    turns and 2p + 2 (`in_flight` for another number). In turns it takes m + p pairs of ticks, one more than 1F1B.

    Raises:
      ValueError: fewer than 4 stages, where the two swaps would share a stage.
    """
    positive(devices=devices, microbatches=microbatches)
    window = _factor(warm_up) * devices + 2 if in_flight is None else in_flight
    paths = swapped_paths(devices, microbatches)
    policy = "backward" if warm_up == "least" else "turns"
    return greedy("checkfree+", Placement.round_robin(devices), paths, in_flight=window, policy=policy)


def swapped_paths(stages: int, microbatches: int) -> tuple[Path, ...]:
    """CheckFree+'s paths: 0 1 2 ... n-1 for even microbatches, 1 0 2 ... n-1 n-2 for odd ones."""
    if stages < 4:
        raise ValueError(
            f"{stages} stages cannot swap their first two and their last two; nearest: 4 stages, or 1f1b without swaps"
        )
    plain = tuple(range(stages))
    swapped = (1, 0, *plain[2:-2], stages - 1, stages - 2)
    return tuple(swapped if m % 2 else plain for m in range(microbatches))


def skippipe(
    devices: int, paths: Sequence[Iterable[int]], warm_up: WarmUp = "least", *, in_flight: int | None = None
) -> Order:
    """SkipPipe (Blagoev et al. 2025, "SkipPipe: Partial and Reordered Pipelining Framework"): each microbatch visits the
    stages of its own path, fewer than all, perhaps reordered. The paths come from a solver, or from `even_skips`.

    With the least warm-up backward first and p microbatches in flight, with the double one forwards and backwards in
    turns and 2p (`in_flight` for another number).

    Raises:
      ValueError: a path that visits a missing stage, or one twice.
    """
    positive(devices=devices)
    window = _factor(warm_up) * devices if in_flight is None else in_flight
    paths = check_paths([tuple(path) for path in paths], devices)
    policy = "backward" if warm_up == "least" else "turns"
    return greedy("skippipe", Placement.round_robin(devices), paths, in_flight=window, policy=policy)


def even_skips(stages: int, microbatches: int, skipped: int = 1) -> tuple[Path, ...]:
    """Paths that leave out `skipped` stages each, never the first, in turns: loads of stages differ by at most one.

    SkipPipe keeps stage 0, which embeds, in every path and loads the others evenly (its constraint of uniform stage
    usage); routes chosen for the links' speeds need a solver.
    """
    positive(stages=stages, microbatches=microbatches)
    if not 0 <= skipped < stages:
        raise ValueError(f"{skipped} of {stages} stages cannot be skipped: the first stays; give 0 to {stages - 1}")
    paths = []
    for m in range(microbatches):
        out = {1 + (m * skipped + k) % (stages - 1) for k in range(skipped)}
        paths.append(tuple(s for s in range(stages) if s not in out))
    return tuple(paths)


SCHEDULES: dict[str, Callable[..., Order]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb-h1": zb_h1,
    "zb-v": zb_v,
    "dualpipe-v": dualpipe_v,
    "checkfree+": checkfree_plus,
    "skippipe": lambda devices, microbatches, warm_up="least": skippipe(
        devices, even_skips(devices, microbatches, skipped=min(1, devices - 1)), warm_up
    ),
}
"""By name, for `make`. SkipPipe has here the paths of `even_skips`, which leave out one stage."""

CHUNKS = {"interleaved": None, "zb-v": 2, "dualpipe-v": 2}
"""The chunks a schedule has: any number (None), or exactly so many; those not listed have 1."""


def make(name: str, devices: int, microbatches: int, chunks: int | None = None, *, warm_up: WarmUp = "least") -> Order:
    """A schedule by name. `1f1b` with several chunks is `interleaved`; `chunks=None` is the schedule's own number. The
    warm-up is for those in WARM_UPS.

    Raises:
      ValueError: an unknown name, or numbers that the schedule does not allow.
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown schedule {name!r}{hint}; schedules: {', '.join(SCHEDULES)}")
    if name == "1f1b" and chunks is not None and chunks > 1:
        name = "interleaved"
    own = CHUNKS.get(name, 1)
    if own is None:
        return interleaved(devices, microbatches, 2 if chunks is None else chunks)
    if chunks not in (None, own):
        raise ValueError(f"{name} has {own} chunk(s) on a device, not {chunks}; 'interleaved' takes any number")
    if name in WARM_UPS:
        return SCHEDULES[name](devices, microbatches, warm_up)
    return SCHEDULES[name](devices, microbatches)


class _Taker:
    """Appends a device's next task of a kind and chunk, and nothing where all microbatches have had it."""

    def __init__(self, stages: dict[int, int], microbatches: int):
        self.tasks: list[Task] = []
        self._stages, self._microbatches = stages, microbatches
        self._next = {(half, c): 0 for half in "fbw" for c in stages}

    def __call__(self, kind: Kind, chunk: int = 0) -> Task | None:
        counter = ({F: "f", B: "b", BI: "b", BW: "w"}[kind], chunk)
        microbatch = self._next[counter]
        if microbatch == self._microbatches:
            return None
        self._next[counter] += 1
        task = Task(kind, self._stages[chunk], microbatch)
        self.tasks.append(task)
        return task

    def append(self, of: Task, kind: Kind) -> None:
        self.tasks.append(Task(kind, of.stage, of.microbatch))

    def left(self, kind: Kind | None = None, chunk: int = 0) -> bool:
        """Whether the kind has microbatches left; with no kind, whether anything has."""
        if kind is None:
            return any(n < self._microbatches for n in self._next.values())
        return self._next[{F: "f", BI: "b", BW: "w"}[kind], chunk] < self._microbatches


def _factor(warm_up: WarmUp) -> int:
    if warm_up not in ("least", "double"):
        raise ValueError(f"warm_up = {warm_up!r}; it is 'least' or 'double'")
    return 1 if warm_up == "least" else 2


def _alternate(forwards: list[Task], backwards: list[Task], first: int) -> list[Task]:
    """`first` forwards, then a forward and a backward in turns, then the backwards that are left."""
    order = forwards[:first]
    for k, task in enumerate(forwards[first:]):
        order += [task, backwards[k]]
    return order + backwards[len(forwards) - first :]


def _only(rows: list[list[Task]], microbatches: int) -> list[list[Task]]:
    """Without the microbatches that are too many. An order that can run still can: nothing waits for another one."""
    return [[task for task in row if task.microbatch < microbatches] for row in rows]


def _straight(name: str, rows: list[list[Task]], placement: Placement, microbatches: int) -> Order:
    return Order(name, tuple(map(tuple, rows)), placement, straight(placement.stages, microbatches))
