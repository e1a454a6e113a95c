"""Attention in plain XLA."""

from __future__ import annotations

from jaxpar.pallas_kernels.attention.reference import attention_reference as attention_xla

__all__ = ["attention_xla"]
