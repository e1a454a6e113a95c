"""Meshes: sizes, text, what fits, where devices stand, and every sentence with its numbers."""

import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpar.parallel.mesh import (
    AXES,
    MeshConfig,
    factorisations,
    fake_devices,
    make_mesh,
    mesh_sizes,
    over_slices,
    product,
)

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", MeshConfig()),
        ("data=2,tensor=2", MeshConfig(data=2, tensor=2)),
        (" fsdp = 8 ", MeshConfig(fsdp=8)),
        ("data=rest,fsdp=2", MeshConfig(data="rest", fsdp=2)),
    ],
)
def test_parse(text, expected):
    assert MeshConfig.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("dat=2", "mesh 'dat=2' has no axis 'dat' (did you mean 'data'?); axes: data, stage, fsdp, sequence, tensor"),
        ("stages=2", "mesh 'stages=2' has no axis 'stages' (did you mean 'stage'?)"),
        ("pipeline=2", "has no axis 'pipeline'; axes: data, stage, fsdp, sequence, tensor"),
        ("data=0", "mesh axis data = 0 is not a number of devices; give at least 1, or 'rest'"),
        ("tensor=-4", "mesh axis tensor = -4 is not a number of devices"),
        ("data=2,data=3", "gives axis data twice: 2 and 3; keep one"),
        ("data", "'data' is not axis=size; write for instance data=2,tensor=4"),
        ("fsdp=two", "the size of fsdp is 'two'; give a whole number, or 'rest'"),
        ("data=rest,fsdp=rest", "mesh axes data and fsdp are both 'rest'; only one can take what the others leave"),
    ],
)
def test_parse_says_what_is_wrong(text, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        MeshConfig.parse(text)


@pytest.mark.parametrize("size", [0, -1, True, 2.0, "all", None])
def test_a_size_is_a_number_of_devices(size):
    with pytest.raises(ValueError, match="mesh axis fsdp = "):
        MeshConfig(fsdp=size)


@pytest.mark.parametrize(
    ("mesh", "devices", "sentence"),
    [
        (
            MeshConfig(data=2, fsdp=2, tensor=2),
            4,
            "mesh data(2) × fsdp(2) × tensor(2) = 8 != 4 devices; nearest that fits: fsdp(2) × tensor(2)",
        ),
        (
            MeshConfig(data=2, stage=2, fsdp=2, sequence=2, tensor=2),
            16,
            "mesh data(2) × stage(2) × fsdp(2) × sequence(2) × tensor(2) = 32 != 16 devices; nearest that fits: "
            "stage(2) × fsdp(2) × sequence(2) × tensor(2)",
        ),
        (MeshConfig(), 8, "mesh data(1) = 1 != 8 devices; nearest that fits: data(8)"),
        (MeshConfig(fsdp=8), 1, "mesh fsdp(8) = 8 != 1 devices; nearest that fits: data(1)"),
        (MeshConfig(tensor=2), 8, "= 2 != 8 devices; nearest that fits: data(4) × tensor(2)"),
        (MeshConfig(stage=2, sequence=2), 8, "= 4 != 8 devices; nearest that fits: data(2) × stage(2) × sequence(2)"),
        (
            MeshConfig(data="rest", tensor=3),
            8,
            "mesh data(rest) × tensor(3) does not fit 8 devices (8 / 3 is no whole number); nearest that "
            "fits: data(2) × tensor(4)",
        ),
    ],
)
def test_fit_gives_the_equation_and_the_nearest_mesh(mesh, devices, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        mesh.fit(devices)


@given(st.integers(1, 64), st.tuples(*[st.one_of(st.integers(1, 9), st.just("rest"))] * len(AXES)))
def test_fit_takes_all_devices_or_names_a_mesh_that_does(devices, sizes):
    if sizes.count("rest") > 1:
        return
    mesh = MeshConfig(*sizes)
    try:
        fitted = mesh.fit(devices)
    except ValueError as error:
        near = str(error).rsplit("nearest that fits: ", 1)[1]
        near = near.replace(" × ", ",").replace("(", "=").replace(")", "")
        assert np.prod(list(MeshConfig.parse(near).fit(devices).sizes.values())) == devices
        assert "rest" in sizes or np.prod(sizes) != devices
    else:
        assert np.prod(list(fitted.sizes.values())) == devices
        assert all(want in ("rest", got) for got, want in zip(fitted.sizes.values(), sizes, strict=True))


@given(st.integers(1, 60), st.integers(1, 4))
def test_factorisations_are_all_there_once(n, parts):
    found = list(factorisations(n, parts))
    assert len(set(found)) == len(found)
    assert all(np.prod(f) == n for f in found)
    if parts == 2:
        assert len(found) == sum(n % d == 0 for d in range(1, n + 1))


def test_make_mesh_has_every_axis_and_keeps_neighbours_on_the_last(devices):
    mesh = make_mesh(MeshConfig(data="rest", fsdp=2, tensor=2))
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": 2, "stage": 1, "fsdp": 2, "sequence": 1, "tensor": 2}
    assert [d.id for d in mesh.devices[0, 0, 0, 0]] == [0, 1]
    assert all(t == jax.sharding.AxisType.Auto for t in mesh.axis_types)
    ring = make_mesh(MeshConfig(stage=2, fsdp=2, sequence="rest"))
    assert dict(ring.shape) == {"data": 1, "stage": 2, "fsdp": 2, "sequence": 2, "tensor": 1}
    assert [d.id for d in ring.devices[0, 0, 0, :, 0]] == [0, 1]


def test_make_mesh_takes_the_devices_it_is_given(devices):
    mesh = make_mesh(MeshConfig(fsdp=2), devices[4:6])
    assert [d.id for d in mesh.devices.flat] == [4, 5]
    with pytest.raises(ValueError, match=r"mesh fsdp\(2\) = 2 != 3 devices"):
        make_mesh(MeshConfig(fsdp=2), devices[:3])


def test_sizes_come_from_a_mesh_a_config_or_a_mapping(devices):
    expected = {"data": 4, "stage": 1, "fsdp": 1, "sequence": 1, "tensor": 2}
    assert mesh_sizes(make_mesh(MeshConfig(data=4, tensor=2))) == expected
    assert mesh_sizes(MeshConfig(data=4, tensor=2)) == expected
    assert mesh_sizes(expected) == expected
    with pytest.raises(ValueError, match=r"mesh axis data is 'rest': its size is known once fit\(devices\) was called"):
        mesh_sizes(MeshConfig(data="rest"))


@pytest.mark.parametrize(
    ("sizes", "slices", "expected"),
    [
        ((4, 1, 4, 1, 1), 8, (4, 1, 2, 1, 1)),
        ((2, 1, 8, 1, 4), 4, (2, 1, 2, 1, 1)),
        ((6, 1, 2, 1, 2), 4, (2, 1, 2, 1, 1)),
        ((1, 1, 8, 1, 1), 2, (1, 1, 2, 1, 1)),
        ((2, 4, 4, 1, 1), 4, (2, 2, 1, 1, 1)),  # stages before fsdp
        ((2, 1, 2, 4, 1), 4, (2, 1, 2, 1, 1)),  # fsdp before the ring, which is inside a slice
    ],
)
def test_slices_lie_along_the_outer_axes(sizes, slices, expected):
    assert over_slices(dict(zip(AXES, sizes, strict=True)), slices) == expected


@pytest.mark.parametrize("inner", ["sequence", "tensor"])
def test_slices_never_split_an_inner_axis(inner):
    sentence = (
        rf"mesh fsdp\(2\) × {inner}\(4\) cannot be laid over 4 slices: data × stage × fsdp must be a multiple of 4"
    )
    with pytest.raises(ValueError, match=sentence):
        over_slices(MeshConfig(**{"fsdp": 2, inner: 4}).sizes, 4)


def test_a_mesh_over_two_slices_keeps_inner_axes_inside_one(monkeypatch):
    """Made-up devices: nothing but their attributes is read."""
    made = [
        SimpleNamespace(id=i, slice_index=i % 2, process_index=i // 4, platform="cpu", device_kind="cpu")
        for i in range(8)
    ]
    monkeypatch.setattr(jax.sharding, "Mesh", lambda devices, axes, **_: devices)
    array = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), made)
    assert array.shape == (2, 1, 2, 1, 2)
    for along_data in range(2):
        assert len({d.slice_index for d in array[along_data].flat}) == 1
    assert array[0, 0, 0, 0, 0].slice_index != array[1, 0, 0, 0, 0].slice_index


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({}, ""),
        (MeshConfig().sizes, "data(1)"),
        (MeshConfig(stage=2, tensor=4).sizes, "stage(2) × tensor(4)"),
        ({"fsdp": 1, "tensor": 1}, "fsdp(1)"),
        ({"data": "rest", "fsdp": 1}, "data(rest)"),
    ],
)
def test_messages_show_the_axes_that_are_used(sizes, text):
    assert product(sizes) == text


def test_fake_devices_come_too_late_here(devices):
    with pytest.raises(RuntimeError, match=r"4 fake devices cannot be made: JAX has started with 8 cpu device"):
        fake_devices(4)
    with pytest.raises(ValueError, match="0 fake devices asked for"):
        fake_devices(0)


@pytest.mark.parametrize("before", ["", "import jax; "])
def test_fake_devices_in_time_and_no_jax_to_make_a_config(before):
    code = (
        "import sys; from jaxpar.parallel.mesh import MeshConfig, fake_devices; import jaxpar.parallel.rules;"
        "MeshConfig.parse('data=3'); assert 'jax' not in sys.modules;"
        f"{before}fake_devices(3); import jax; print(jax.device_count(), jax.default_backend())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["3", "cpu"]
