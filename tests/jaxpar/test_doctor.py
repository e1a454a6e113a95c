"""`jaxpar doctor`: everything here, something missing, something too old."""

from importlib import metadata

import pytest

from jaxpar import doctor


@pytest.fixture
def report():
    def run():
        lines = []
        code = doctor.doctor(lines.append)
        return code, "\n".join(lines)

    return run


def test_here(report, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXPAR_CACHE", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    code, text = report()
    assert code == 0, text
    assert f"jax                {metadata.version('jax')}" in text
    assert "8 x cpu" in text
    assert "--fake-devices 8" in text
    assert f"{tmp_path}/compiled: 0 files" in text
    assert "everything that a run needs is here" in text


def test_the_ranges_come_from_the_metadata(report, monkeypatch):
    real = metadata.version
    versions = {"jax": "0.9.0", "optax": None, "gguf": None}

    def version(name):
        if name in versions:
            if versions[name] is None:
                raise metadata.PackageNotFoundError(name)
            return versions[name]
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    code, text = report()
    assert code == 1
    assert "problem: jax is 0.9.0, tested is >=0.10.2,<0.13; pip install 'jax>=0.10.2,<0.13'" in text
    assert "problem: optax is missing, tested is" in text
    assert "pip install 'jaxpar[huggingface]'   (lacks gguf)" in text
    assert "2 to mend before a run can start" in text


def test_every_extra_is_listed(report):
    _, text = report()
    for extra in doctor.extras():
        assert f"\n  {extra} " in text


def test_a_cache_that_cannot_be_written_to(report, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXPAR_CACHE", str(tmp_path / "file"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    code, text = report()
    assert code == 0  # a run is slower to start without it, but starts
    assert "cannot be written to (Not a directory): set JAXPAR_CACHE" in text
