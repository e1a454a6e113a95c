"""Schedules of any size that their rules allow, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from jaxpar.parallel.pipeline import orders
from jaxpar.parallel.pipeline.tasks import Order


@st.composite
def any_order(draw, devices: int = 6, microbatches: int = 9) -> Order:
    name = draw(st.sampled_from(sorted(orders.SCHEDULES)))
    p = draw(st.integers(4 if name == "checkfree+" else 2 if name == "interleaved" else 1, devices))
    m = draw(st.integers(1, microbatches))
    if name == "interleaved":
        groups = draw(st.integers(1, max(1, microbatches // p)))
        return orders.interleaved(p, groups * p, draw(st.integers(1, 3)))
    warm_up = draw(st.sampled_from(orders.WARM_UPS.get(name, ("least",))))
    if name == "skippipe":
        path = st.permutations(range(p)).flatmap(lambda q: st.integers(1, p).map(lambda n: tuple(q[:n])))
        paths = draw(st.lists(path, min_size=1, max_size=m))
        return orders.skippipe(p, paths, warm_up, in_flight=draw(st.integers(1, p + 2)))
    return orders.make(name, p, m, warm_up=warm_up)
