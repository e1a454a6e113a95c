"""XLA flags of processes that test."""

from importlib.metadata import version

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
"""To compile for CPUs fast. What is compiled is most of the suite's time, and how fast it then runs is nothing that it is about:
LLVM takes no pains, and a program is one module of code, for there are as many test processes as cores, and splitting it costs
some of the time. XLA's own passes stay as they are."""

if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    # XLA writes LLVM's code itself, without MLIR between them: a quarter to a half of the time. Newer ones cannot, and end at a
    # flag that they do not know.
    QUICK += " --xla_cpu_use_fusion_emitters=false"
