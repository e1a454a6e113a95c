"""Generation as the command line asks for it: through exits or not, and with a cache in pages or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxpar import generation
from jaxpar.adaptive.decode import exit_early
from jaxpar.adaptive.policy import Decoding, Speculate
from jaxpar.adaptive.speculate import speculate
from jaxpar.adaptive.verify import verified
from jaxpar.errors import UserError
from jaxpar.models.config import ModelConfig
from jaxpar.paged_generation import generate_paged
from jaxpar.paging import Paged
from jaxpar.sampling import Sampler


@dataclass(frozen=True)
class Continued(generation.Continued):
    """Attributes:
    note: what exits saved, or pages took, a sentence. Empty where neither was asked for.
    """

    note: str = ""


def continued(
    cfg: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    sampler: Sampler,
    decoding: Decoding | None = None,
    skip: Any = None,
    steering: Any = None,
    pages: Paged | None = None,
    key=None,
    **options: Any,
) -> Continued:
    """`jaxpar.generation.continued`, or through exits, or through pages.

    Raises:
      UserError: parts that are skipped, or a stream that is steered, where exits decide; either where the cache lies in pages;
        drafts where tokens are drawn; and what `exit_early`, `speculate`, `verified` and `generate_paged` refuse.
    """
    if pages is not None:
        if decoding is not None or skip is not None:
            flag, what = (
                ("--skip", "leave layers out") if decoding is None else ("--decoding", "leave early or are drafted")
            )
            raise UserError(
                f"--pages and {flag} are not combined: tokens that {what} need the dense cache; leave one of the two away"
            )
        served = generate_paged(
            cfg, params, prompts, paging=pages, sampler=sampler, key=key, steering=steering, **options
        )
        rows = min(pages.rows, len(prompts))
        note = (
            f"{len(prompts)} prompts on {rows} rows: {served.peak} of {pages.pages} pages of {pages.page} tokens at most, "
            f"{served.evictions} evictions"
        )
        return Continued(served.rows, note=note)
    if decoding is None:
        options |= dict(skip=skip, steering=steering)
        found = generation.continued(cfg, params, prompts, sampler=sampler, key=key, **options)
        return Continued(found.rows, found.skipped, found.spared)
    drafts = isinstance(decoding, Speculate)
    if skip is not None and not (drafts and decoding.layer is None):
        raise UserError(
            "--skip and --decoding both say what a token leaves out, and are not combined: leave one of them away, or take "
            "--decoding speculate without a layer, which drafts with --skip and verifies with the whole model"
        )
    if steering is not None:
        raise UserError(
            "--steer moves the stream that exits read, whose confidence is not known there: leave --steer or --decoding away"
        )
    if drafts:
        if sampler.temperature > 0:
            raise UserError(
                f"temperature = {sampler.temperature} draws tokens, and --decoding speculate verifies greedy ones; set "
                "temperature = 0, or take --decoding exit-early"
            )
        return drafted(cfg, params, prompts, decoding, skip, options)
    found = exit_early(cfg, params, prompts, decoding, sampler=sampler, key=key, **options)
    total = max(sum(found.exits), 1)
    shares = [f"{100 * n / total:.0f} % of the tokens left" for n in found.exits]
    by = [f"{share} behind layer {layer}" for share, layer in zip(shares, decoding.exits(cfg), strict=False)]
    return Continued(found.rows, note=f"{', '.join(by)}; {found.depth:.2f} of {cfg.layers} layers a token")


def drafted(cfg: ModelConfig, params: Any, prompts: Sequence, decoding: Speculate, skip, options: dict) -> Continued:
    if skip is None:
        layer = decoding.behind(cfg)
        found = speculate(cfg, params, prompts, layer=layer, draft=decoding.draft, **options)
        how = f"behind layer {layer} of {cfg.layers}"
    else:
        found = verified(cfg, params, prompts, skip, draft=decoding.draft, **options)
        how = "with parts left out"
    note = (
        f"drafts of {decoding.draft} tokens {how}: {100 * found.acceptance:.1f} % accepted, "
        f"{found.tokens_per_round:.2f} tokens for each call of the whole model"
    )
    return Continued(found.rows, note=note)
