"""The compile cache: where it is, that a second process uses it, and that a bad folder is one sentence."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxpar import compile_cache


@pytest.fixture
def jax_config():
    names = (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def bare(monkeypatch):
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAXPAR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_where(bare, tmp_path):
    bare.setenv("HOME", str(tmp_path))
    assert compile_cache.folder() == tmp_path / ".cache" / "jaxpar" / "compiled"
    bare.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compile_cache.folder() == tmp_path / "xdg" / "jaxpar" / "compiled"
    bare.setenv("JAXPAR_CACHE", str(tmp_path / "own"))
    assert compile_cache.folder() == tmp_path / "own" / "compiled"
    bare.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    assert compile_cache.folder() == tmp_path / "jax"


def test_not_writable_is_a_sentence(bare, tmp_path, jax_config):
    (tmp_path / "file").write_text("")
    bare.setenv("JAXPAR_CACHE", str(tmp_path / "file"))
    said = []
    assert compile_cache.enable(say=said.append) is None
    assert said == [
        f"compiled programs are not kept: {tmp_path / 'file' / 'compiled'} cannot be written to (Not a directory); "
        "set JAXPAR_CACHE to another folder"
    ]


def test_off(bare, tmp_path, jax_config):
    bare.setenv("JAXPAR_CACHE", str(tmp_path))
    assert compile_cache.enable(False) is None
    assert not jax.config.jax_enable_compilation_cache
    assert list(tmp_path.iterdir()) == []


PROGRAM = """
import jax, jax.numpy as jnp
from jaxpar import compile_cache
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
compile_cache.enable()
f = lambda x: [x := jnp.sin(x @ x) for _ in range(1000)][-1]
jax.jit(f)(jnp.ones((8, 8))).block_until_ready()
print(events.count("/jax/compilation_cache/cache_hits"))
"""


def test_a_second_process_compiles_nothing(bare, tmp_path):
    bare.setenv("JAXPAR_CACHE", str(tmp_path))
    # The suite's own flags put no effort into code: compiling may be too quick to be kept then.
    bare.delenv("XLA_FLAGS", raising=False)
    hits = [
        int(subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120).stdout)
        for _ in range(2)
    ]
    assert hits[0] == 0
    assert hits[1] >= 1
    files, size = compile_cache.size(Path(tmp_path) / "compiled")
    assert files >= 1
    assert size > 0
