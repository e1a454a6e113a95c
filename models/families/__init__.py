"""Families of published models, each one table used in both directions (see `table`)."""

from jaxpar.models.families import gemma3, gpt2, llama, mistral, qwen2, qwen3
from jaxpar.models.families.table import Family

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    gemma3.FAMILY,
    gpt2.FAMILY,
)
