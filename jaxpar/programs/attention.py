"""Whether the implementation of attention that a model names can do what a program will ask of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxpar.models.config import ModelConfig
from jaxpar.models.layers import kinds
from jaxpar.pallas_kernels.attention import ATTENTION, MaskSpec


def check_attention(cfg: ModelConfig, mesh: Mesh, rows: int | None, length: int | None) -> None:
    """Nothing is traced.

    Args:
      rows, length: of the batch. None: one, and the model's context.

    Raises:
      ValueError: an implementation that does not run on these devices, or not with these shapes or on several devices.
    """
    if (name := cfg.attention_implementation) is None:
        return
    B, T = rows or 1, length or cfg.context
    shape = lambda heads: jax.ShapeDtypeStruct((B, T, heads, cfg.head_size), jnp.dtype(cfg.dtype))
    sliding = kinds(cfg)
    traced = jax.ShapeDtypeStruct((), jnp.int32)
    window = traced if len(sliding) > 1 else cfg.window if any(sliding) else None
    segments = jax.ShapeDtypeStruct((B, T), jnp.int32)
    mask = MaskSpec(window=window, q_segments=segments, k_segments=segments)
    call = dict(mask=mask, scale=cfg.scale, cap=cfg.attention_cap, lse_out=mesh.shape["sequence"] > 1)
    here = AbstractMesh((), (), abstract_device=mesh.abstract_mesh.abstract_device)
    with jax.sharding.use_abstract_mesh(here):
        try:
            ATTENTION.choose(name, shape(cfg.heads), shape(cfg.kv_heads), shape(cfg.kv_heads), **call)
        except ValueError as error:
            raise ValueError(f"model.attention_implementation: {error}") from None
    if ATTENTION.named(name).kernel and mesh.size > 1:
        raise ValueError(
            f'model.attention_implementation = "{name}" is a kernel, which the compiler cannot split over the {mesh.size} '
            'devices of this mesh; use "xla", or one device'
        )
