"""Attention: one public function, several implementations, and the mask as data."""

from jaxpar.pallas_kernels.attention.api import IMPLEMENTATIONS, attention
from jaxpar.pallas_kernels.attention.mask import MaskSpec
from jaxpar.pallas_kernels.attention.reference import attention_reference
from jaxpar.pallas_kernels.attention.xla import ATTENTION_LSE, ATTENTION_OUT

__all__ = ["ATTENTION_LSE", "ATTENTION_OUT", "IMPLEMENTATIONS", "MaskSpec", "attention", "attention_reference"]
