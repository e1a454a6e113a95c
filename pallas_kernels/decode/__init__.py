"""Attention of a few queries a row with a long cache: one public function, several implementations."""

from jaxpar.pallas_kernels.decode.api import DECODE_ATTENTION, MOST_QUERIES, decode_attention

__all__ = ["DECODE_ATTENTION", "MOST_QUERIES", "decode_attention"]
