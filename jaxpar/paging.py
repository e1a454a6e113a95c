"""Generation through pages, as a choice: how many rows run at once, and the pages that they share. Free of JAX at import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from jaxpar.errors import UserError


@dataclass(frozen=True)
class Paged:
    """Keys and values lie in pages, prompts wait in a queue, and rows that end make room (`jaxpar.paged_generation`).

    Attributes:
      rows: prompts that run at once.
      pages: pages for all of them together.
      page: tokens a page; a power of two where Hopper's kernel is to read them.
      chunk: tokens of a prompt that a row reads in one turn; a turn in which any row does costs all rows that many.
    """

    rows: int = 8
    pages: int = 64
    page: int = 16
    chunk: int = 32

    def __post_init__(self):
        for field in fields(self):
            if (value := getattr(self, field.name)) < 1:
                raise UserError(f"pages.{field.name} = {value} must be at least 1")

    def of(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.page)

    def check(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        """Raises UserError where a prompt and its new tokens take more pages than there are: it would wait for ever."""
        for i, prompt in enumerate(prompts):
            # Nothing follows the last new token: its keys are not kept.
            kept = len(prompt) + new_tokens - 1
            if (needed := self.of(kept)) > self.pages:
                raise UserError(
                    f"prompt {i} has {len(prompt)} tokens and {new_tokens} new ones were asked for, whose keys and values take "
                    f"{needed} pages of {self.page} tokens, but pages.pages = {self.pages}; set it to {needed} or more, or ask "
                    "for fewer tokens"
                )
