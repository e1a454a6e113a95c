"""Rings whose blocks are a Pallas kernel, forward and backward, in the interpreter, against dense attention."""

import re
from collections import Counter

import numpy as np
import pytest
from jax.sharding import Mesh
from sharded import MASKS, dense, draw, in_layout, locally, same, score, stored

from jaxpar.parallel.sequence.layouts import Layout
from jaxpar.parallel.sequence.ring import ring_attention
from jaxpar.parallel.sequence.tokenring import tokenring_attention

T = 16


@pytest.mark.parametrize(("ring", "layout"), [(ring_attention, "zigzag"), (tokenring_attention, "contiguous")])
def test_blocks_are_the_kernels_both_ways(devices, ring, layout):
    """Grouped queries, packed documents with padding, causal with a window: equal to one device to float32 rounding, and
    each block has the kernels of both passes: its forward one, dq, and dk with dv."""
    mesh = Mesh(np.asarray(devices[:2]), ("sequence",))
    order = Layout(layout, 2, T)
    q, k, v, *weights = stored(order, draw(T))
    options = dict(layout=layout, axis="sequence", implementation="mosaic_tpu", interpret=True, check_vma=False)
    f = locally(ring, mesh, in_layout(order, MASKS["all"](T)), **options)
    run = score(f, *weights)
    (_, outputs), gradients = run(q, k, v)
    same(order, outputs, gradients, dense("all", None, T))
    kernels = Counter(re.findall(r"name=attention_(forward|backward_\w)\b", str(run.trace(q, k, v).jaxpr)))
    assert set(kernels) == {"forward", "backward_q", "backward_k"}, kernels
    assert len(set(kernels.values())) == 1, kernels
