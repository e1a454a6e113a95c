"""Attention: one public function, several implementations, and the mask as data."""

from jaxpar.pallas_kernels.attention.api import ATTENTION, IMPLEMENTATIONS, attention, attention_gradients
from jaxpar.pallas_kernels.attention.differentiable import ATTENTION_LSE, ATTENTION_OUT
from jaxpar.pallas_kernels.attention.mask import MaskSpec
from jaxpar.pallas_kernels.attention.reference import attention_reference

__all__ = [
    "ATTENTION",
    "ATTENTION_LSE",
    "ATTENTION_OUT",
    "IMPLEMENTATIONS",
    "MaskSpec",
    "attention",
    "attention_gradients",
    "attention_reference",
]
