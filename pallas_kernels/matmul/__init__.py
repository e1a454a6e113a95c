"""Products of matrices in number formats: one public function, several implementations.

api.py          quant_matmul: which operand is in which format, forwards and backwards
products.py     one product of two operands with plain XLA: integers, 8-bit floats, or scaled values
scaled_dot.py   the same by XLA's own scaled product, for the formats that some chips multiply themselves
mixed.py        weights in 4 bits, activations in 4 or 8, block by block
mixed_tpu.py    a kernel for TPUs that walks both kinds of blocks
mosaic_tpu.py   kernels for TPUs: int8 with int8, and weights in 4 bits
mosaic_gpu.py   kernels for Hopper GPUs: 8 bits with the same 8 bits, and weights in 4 or 8 bits
gpu_eight.py    what those of 8 bits with 8 bits do
gpu_kernels.py  what those of weights in 4 or 8 bits do
gpu_few_rows.py  what those of weights in 4 or 8 bits with few rows of x do, and
gpu_registers.py  how codes become operands in registers there
mosaic_gpu_codes.py  another kernel for those, of warps that wait for nothing but memory: gpu_codes.py the frame of a block, and
gpu_codes_program.py  what its warps do
reference.py    the same in NumPy: float64, and int64 where both are integers
"""

from jaxpar.pallas_kernels.matmul.api import IMPLEMENTATIONS, PRODUCT, Operands, quant_matmul
from jaxpar.pallas_kernels.matmul.reference import product_reference

__all__ = ["IMPLEMENTATIONS", "PRODUCT", "Operands", "product_reference", "quant_matmul"]
