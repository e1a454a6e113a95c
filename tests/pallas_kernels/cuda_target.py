"""Kernels compiled for an H200 on a machine without a GPU, and what the compiler says of them. Extra `cuda-aot`.

A test starts a process of its own, for JAX has started with CPU devices in pytest's, and the compiler's messages are asked
for by environment variables that it reads when it starts:

    @cuda_target.needs_compiler
    def test_...(tmp_path):
        run = start(["-m", "tests....", str(file)], **cuda_target.environment())

and in that process `compiled(function, shape, ...)` traces, lowers and compiles for one H200.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

SHARED_BYTES = 232448
"""What a block may have: 227 KiB."""
TARGET = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {SHARED_BYTES} shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 device_memory_size: 150000000000
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "NVIDIA H200"
"""
"""An H200 as XLA describes it (its `GpuTargetConfigProto`); accelerated features are what sm_90a has over sm_90."""


def _folder() -> Path | None:
    """Where the wheel of nvcc put ptxas, bin/ptxas below it."""
    spec = importlib.util.find_spec("nvidia")
    found = [Path(place) / "cu13" for place in spec.submodule_search_locations] if spec else []
    return next((place for place in found if (place / "bin" / "ptxas").exists()), None)


def missing() -> str | None:
    """Why nothing can be compiled for a GPU here, or None."""
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        return "XLA's compiler for NVIDIA GPUs (jax-cuda13-plugin) is not installed (extra cuda-aot)"
    return None if _folder() else "ptxas (nvidia-cuda-nvcc) is not installed (extra cuda-aot)"


needs_compiler = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def environment() -> dict[str, str]:
    """Environment variables of a process that compiles."""
    folder = _folder()
    return {
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "-1",
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={folder} --xla_gpu_autotune_level=0",
        # A program from the cache would not be compiled, and nothing said of it.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }


@dataclass(frozen=True)
class Kernel:
    """One Mosaic GPU kernel of a compiled program.

    Attributes:
      ptx: its text.
      registers: of a thread, at its launch.
      spills: bytes that a thread stores for want of registers.
      shared: bytes of shared memory that a block has.
    """

    name: str
    ptx: str
    registers: int
    spills: int
    shared: int

    @property
    def products(self) -> set[str]:
        """The matrix instructions in it: "m64n128k32.s32.s8.s8"."""
        return set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.([\w.]+)", self.ptx))

    @property
    def target(self) -> str:
        return re.search(r"^\.target (\w+)", self.ptx, re.M).group(1)


@dataclass(frozen=True)
class Compiled:
    """A program: its kernels, the bytes that it takes beside its arguments and results, and XLA's text of it."""

    kernels: tuple[Kernel, ...]
    temp_bytes: int
    text: str

    def in_place(self) -> tuple[int, int]:
        """How many calls write into an operand, in all and inside of fusions, which do not know of it."""
        found = inside = 0
        for computation in re.split(r"\n\n", self.text):
            calls = computation.count("output_to_operand_aliasing=")
            found += calls
            inside += calls * bool(re.search(r"^%?[\w.-]*fusion", computation.lstrip()))
        return found, inside


@functools.cache
def mesh():
    """One H200, as a mesh with the axis "x"."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x1")
    return jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))


def compiled(function, *shapes) -> Compiled:
    """A function compiled for one H200, in a process with `environment()`.

    The mesh in scope says what the trace is for, so that `implementation="mosaic_gpu"` is taken. A kernel that the process
    has compiled before is not compiled again, and then is not among the kernels.

    Args:
      shapes: trees of `jax.ShapeDtypeStruct`.

    Raises:
      Whatever the compiler does: more shared memory than a block has, more registers than there are, ...
    """
    import jax

    there = jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec())
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        with jax.sharding.use_abstract_mesh(mesh().abstract_mesh):
            traced = jax.jit(function).trace(*jax.tree.map(place, shapes))
            done = traced.lower(lowering_platforms=("cuda",)).compile()
        kernels = tuple(_read(file) for file in sorted(Path(folder).glob("*.ptx")))
    return Compiled(kernels, done.memory_analysis().temp_size_in_bytes, done.as_text())


def _read(ptx: Path) -> Kernel:
    said = ptx.with_suffix(".ptxas").read_text()
    number = lambda pattern, text: int(re.search(pattern, text).group(1))
    # How much shared memory is asked for stands in the launch, and that in no output but this: by name, of a constant above it.
    constants = {}
    with ptx.with_suffix(".mlir-passes.log").open() as passes:
        for line in passes:
            if constant := re.match(r"\s*(%\w+) = arith\.constant (\d+) : i32", line):
                constants[constant[1]] = int(constant[2])
            elif launch := re.search(r"dynamic_shared_memory_size (%\w+)", line):
                break
    return Kernel(
        name=ptx.stem,
        ptx=ptx.read_text(),
        registers=number(r"Used (\d+) registers", said),
        spills=number(r"(\d+) bytes spill stores", said),
        shared=constants[launch[1]],
    )
