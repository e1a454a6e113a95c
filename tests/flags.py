"""XLA flags of processes that test."""

QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false"
)
"""To compile for CPUs fast. What is compiled is most of the suite's time, and how fast it then runs is nothing that it is about:
LLVM takes no pains; a program is one module of code, for there are as many test processes as cores, and splitting it costs some
of the time; and XLA writes LLVM's code itself, without MLIR between them. XLA's own passes stay as they are."""
