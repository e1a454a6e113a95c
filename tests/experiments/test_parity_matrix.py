"""The long parity command: what it would run, what a case gives, and what it writes."""

import json

import pytest

from jaxpar.experiments.parity import compare, matrix
from jaxpar.models.norms import RMSNorm
from jaxpar.parallel.mesh import AXES, MeshConfig


def test_the_cases_are_every_factorisation_kind_schedule_and_form_of_products():
    found = list(matrix.cases(8, ["llama", "gpt2", "gemma"]))
    names = [name for name, *_ in found]
    assert len(set(names)) == len(names)
    meshes = {mesh for _, model, mesh, how in found if model == "gemma" and not how}
    assert len(meshes) == 35
    assert {tuple(mesh.sizes) for mesh in meshes} == {AXES}
    assert all(f"{kind}, {layout}" in " ".join(names) for kind in matrix.ATTENTIONS for layout in matrix.LAYOUTS)
    assert all(f", {schedule}, " in " ".join(names) for schedule in matrix.SCHEDULES)
    assert all(
        f"{model}: {mesh}, products {how}" in names
        for model in ("llama", "gpt2", "gemma")
        for mesh in ("data(2) × fsdp(2) × tensor(2)", "stage(2) × fsdp(2) × tensor(2)")
        for how in matrix.PRODUCTS
    )


def test_a_case_that_is_equal_one_that_is_not_and_one_that_cannot_be(devices, monkeypatch):
    good = matrix.run_case("llama", MeshConfig(data=2), {})
    assert good["verdict"] == "ok"
    assert 0 < good["parameters"] < 2e-4
    other = compare.LLAMA.replace(norm=RMSNorm(epsilon=1e-2))
    monkeypatch.setitem(compare.MODELS, "another", other)
    monkeypatch.setattr(compare, "reference", lambda name, **size: compare.run(compare.LLAMA, MeshConfig(), **size))
    assert "gradients differ: relative error" in matrix.run_case("another", MeshConfig(data=2), {})["verdict"]
    refused = matrix.run_case("seven layers", MeshConfig(stage=8), {})
    assert "8 pipeline stages are more than the model's 7 layers" in refused["refused"]


def test_results_are_kept_and_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "fake_devices", lambda n: None)
    ran = []

    def case(model, mesh, how):
        ran.append(mesh)
        verdict = "ok" if mesh.data == 8 else "losses differ: relative error 1"
        return {"verdict": verdict, "losses": 0.0, "gradients": 0.0, "parameters": 0.0, "seconds": 1.0}

    monkeypatch.setattr(matrix, "run_case", case)
    line = ["--models", "llama", "--out", str(tmp_path), "--only"]
    assert matrix.main([*line, "llama: data(8)"]) == 0
    assert matrix.main([*line, "llama: data(8)"]) == 0
    assert len(ran) == 1
    assert matrix.main([*line, "llama: tensor(8)"]) == 1
    written = json.loads((tmp_path / "matrix_8.json").read_text())["results"]
    assert set(written) == {"llama: data(8)", "llama: tensor(8)"}
    assert "| llama: data(8) | 0.0e+00 |" in (tmp_path / "matrix_8.md").read_text()
    with pytest.raises(SystemExit):
        matrix.main(["--devices", "12"])
