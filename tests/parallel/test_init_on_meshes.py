"""Parameters are a function of the key alone: bitwise the same on every mesh, however they are spread."""

import math
from functools import partial
from itertools import combinations

import jax
import numpy as np
import pytest
from example_tree import tree

from jaxpar.models import spec
from jaxpar.parallel.mesh import AXES, MeshConfig, make_mesh
from jaxpar.parallel.rules import Rules, check, shardings


def some(layers):
    """One parameter of each kind (compiling is all the time that this takes)."""
    whole = tree(layers, width=32, heads=8, kv_heads=8, head_size=5, hidden=24, vocabulary=40, context=7)
    attention = whole["layers"]["attention"]
    return {
        "embedding": whole["embedding"],
        "layers": {"attention": {name: attention[name] for name in ("norm", "query", "query_norm")}},
    }


SPECS = some(layers=4)
MESHES = [
    *(MeshConfig(**{axis: 8}) for axis in AXES if axis != "stage"),
    MeshConfig(data=2, stage=4),
    MeshConfig(fsdp=2, tensor=4),
    MeshConfig(fsdp=4, tensor=2),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=2, stage=2, fsdp=2),
    MeshConfig(data=2, sequence=2, tensor=2),
    MeshConfig(stage=2, sequence=2, tensor=2),
    MeshConfig(fsdp=2, sequence=2, tensor=2),
]
KEY = 17


def initial(specs, **options):
    return jax.jit(partial(spec.init, specs), **options)(jax.random.key(KEY))


@pytest.fixture(scope="module")
def on_one_device(devices):
    """Initial parameters of the plain program. (Without jit the last bit may differ: there XLA cannot fold two constant
    factors into one. Everything in jaxpar makes parameters under jit.)"""
    return initial(SPECS)


def test_every_two_axes_are_used_together():
    """All 35 meshes of eight devices would be minutes of compiling."""
    together = {pair for cfg in MESHES for pair in combinations([a for a in AXES if cfg.sizes[a] > 1], 2)}
    assert together == set(combinations(AXES, 2))
    assert {math.prod(cfg.sizes.values()) for cfg in MESHES} == {8}


@pytest.mark.parametrize("cfg", MESHES, ids=str)
def test_initial_parameters_are_bitwise_equal(cfg, on_one_device):
    mesh, rules = make_mesh(cfg), Rules()
    check(SPECS, mesh, rules)
    declared = shardings(SPECS, mesh, rules)
    params = initial(SPECS, out_shardings=declared)
    for name, leaf in spec.flatten(SPECS).items():
        got, expected, sharding = params, on_one_device, declared
        for part in name.split("/"):
            got, expected, sharding = got[part], expected[part], sharding[part]
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected), err_msg=name, strict=True)
        assert got.sharding == sharding, name
        shards = {s.data.shape for s in got.addressable_shards}
        assert shards == {sharding.shard_shape(leaf.shape)}, name


def test_the_parameters_are_random_and_differ_by_layer_and_name(on_one_device):
    """Otherwise the equality above would be that of constants."""
    layers = on_one_device["layers"]
    query = np.asarray(layers["attention"]["query"]["kernel"])
    assert np.unique(query).size > 0.99 * query.size
    names = on_one_device["embedding"]
    assert not np.array_equal(np.asarray(names["tokens"])[:7], names["positions"])
    assert not np.array_equal(query[0], query[1])
    np.testing.assert_allclose(query.std(), 0.02, rtol=0.1)


def test_a_layer_does_not_depend_on_how_many_follow(on_one_device):
    fewer = initial(some(layers=2))
    for a, b in zip(jax.tree.leaves(fewer["layers"]), jax.tree.leaves(on_one_device["layers"]), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b)[:2])
