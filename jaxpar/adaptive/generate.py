"""Generation through exits as the command line asks for it: rows, and a sentence on what was saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxpar.adaptive.decode import exit_early
from jaxpar.adaptive.policy import Decoding, Speculate
from jaxpar.adaptive.speculate import speculate
from jaxpar.errors import UserError
from jaxpar.models.config import ModelConfig
from jaxpar.sampling import Sampler


def through_exits(
    decoding: Decoding,
    cfg: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    sampler: Sampler,
    key=None,
    **options: Any,
) -> tuple[list[list[int]], str]:
    """The new tokens of each row, and what to say of them. Options are those of `jaxpar.generation.generate`.

    Raises:
      UserError: drafts where tokens are drawn, or what `exit_early` and `speculate` refuse.
    """
    if not isinstance(decoding, Speculate):
        found = exit_early(cfg, params, prompts, decoding, sampler=sampler, key=key, **options)
        total = max(sum(found.exits), 1)
        shares = [f"{100 * n / total:.0f} %" for n in found.exits]
        by = ", ".join(
            f"{share} behind layer {layer}" for share, layer in zip(shares, decoding.exits(cfg), strict=False)
        )
        return found.rows, f"left {by}, {shares[-1]} behind the last; {found.depth:.2f} of {cfg.layers} layers a token"
    if sampler.temperature > 0:
        raise UserError(
            f"temperature = {sampler.temperature} draws tokens, and --decoding speculate verifies greedy ones; set temperature = 0, "
            "or take --decoding exit-early"
        )
    layer = decoding.behind(cfg)
    found = speculate(cfg, params, prompts, layer=layer, draft=decoding.draft, **options)
    return found.rows, (
        f"drafts of {decoding.draft} tokens behind layer {layer} of {cfg.layers}: {100 * found.acceptance:.1f} % accepted, "
        f"{found.tokens_per_round:.2f} tokens for each call of the whole model"
    )
