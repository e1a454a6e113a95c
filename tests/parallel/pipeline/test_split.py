"""Which layers a virtual stage has, and dealing the stack out and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpar.parallel.pipeline.orders import make
from jaxpar.parallel.pipeline.split import Split
from jaxpar.parallel.pipeline.tasks import Placement

pytestmark = pytest.mark.quick


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 3), st.randoms())
def test_every_layer_stands_once_in_the_order_of_the_stages(layers, devices, chunks, random):
    stages = list(range(devices * chunks))
    random.shuffle(stages)
    placement = Placement(tuple(tuple(stages[d * chunks : (d + 1) * chunks]) for d in range(devices)))
    if len(stages) > layers:
        with pytest.raises(ValueError, match=f"more than the model's {layers} layers"):
            Split(layers, placement)
        return
    split = Split(layers, placement)
    assert [layer for stage in split.of_stage for layer in stage] == list(range(layers))
    sizes = [len(s) for s in split.of_stage]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    # Dealt out and collected again, the stack is what it was.
    assert np.array_equal(split.dealt.ravel()[split.place], np.arange(layers))
    for d, row in enumerate(placement.grid):
        for c, stage in enumerate(row):
            own = split.dealt[d, c, : split.count[d, c]]
            assert list(own) == list(split.of_stage[stage])
            assert split.first[d, c] == own[0]
            assert set(split.dealt[d, c]) <= set(own), "filled up with layers of its own, whose numbers are finite"
    assert split.in_order == (
        (split.even and stages == sorted(stages) and chunks == 1)
        or (split.even and np.array_equal(split.dealt.ravel(), np.arange(layers)))
    )


def test_interleaved_and_v_shaped_placements():
    interleaved = Split(8, make("interleaved", 2, 4, 2).placement)
    assert interleaved.dealt.tolist() == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert not interleaved.in_order
    v = Split(8, make("zb-v", 2, 4).placement)
    assert v.dealt.tolist() == [[[0, 1], [6, 7]], [[2, 3], [4, 5]]]
    assert Split(7, Placement(((0,), (1,)))).dealt.tolist() == [[[0, 1, 2, 3]], [[4, 5, 6, 6]]]


@pytest.mark.parametrize(
    ("layers", "placement", "words"),
    [
        (2, Placement(((0,), (1,), (2,), (3,))), "4 pipeline stages are more than the model's 2 layers; use at most 2"),
        (
            6,
            make("interleaved", 4, 4, 2).placement,
            "4 pipeline stages × 2 chunks = 8 are more than the model's 6 layers; use at most 3 stages",
        ),
    ],
)
def test_more_stages_than_layers_are_refused_with_what_would_fit(layers, placement, words):
    with pytest.raises(ValueError, match=words):
        Split(layers, placement)
