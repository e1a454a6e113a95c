"""Reading `config.json`: every option is honoured, known to change nothing, or refused with a sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

MISSING = object()

HARMLESS = re.compile(
    # Names, versions, token ids, and what only concerns training or Hugging Face's own code.
    r"_.*|is_decoder|.*_version|.*_token_id|.*_token_ids|.*_index|name_or_path|model_type|architectures|auto_map|tokenizer_class|"
    r"dtype|torch_dtype|use_bfloat16|torchscript|use_cache|return_dict|output_attentions|output_hidden_states|"
    r"cache_implementation|chunk_size_feed_forward|id2label|label2id|num_labels|problem_type|finetuning_task|"
    r"task_specific_params|prefix|pretraining_tp|attention_dropout|classifier_dropout|n_ctx|summary_.*|"
    r"reorder_and_upcast_attn|attn_pdrop|tie_encoder_decoder|gradient_checkpointing|"
    # What old configurations hold for generation.
    r"max_length|min_length|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|top_k|"
    r"top_p|typical_p|repetition_penalty|length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|"
    r"bad_words_ids|num_return_sequences|output_scores|return_dict_in_generate|suppress_tokens|begin_suppress_tokens|"
    r"exponential_decay_length_penalty|remove_invalid_values|cross_attention_hidden_size|tf_legacy_loss"
)

PLAIN = {"is_encoder_decoder": False, "add_cross_attention": False, "pruned_heads": {}}
"""Options that every configuration may hold, and the only value that we have."""


class Options:
    """The entries of one `config.json`, or of a dictionary in it, each taken once.

    Args:
      values: the entries.
      family: for messages.
      where: for messages.
    """

    def __init__(self, values: dict, family: str, where: str = "config.json"):
        self.values = dict(values)
        self.family = family
        self.where = where

    def take(self, name: str, default: Any = MISSING) -> Any:
        """The entry, which is then settled; null counts as absent."""
        value = self.values.pop(name, None)
        if value is None and default is MISSING:
            raise ValueError(f"{self.where} has no {name!r}, which {self.family} needs")
        return default if value is None else value

    def _typed(self, name: str, default: Any, is_it: Callable[[Any], bool], kind: str) -> Any:
        given = self.values.get(name) is not None
        value = self.take(name, default)
        if given and not is_it(value):
            raise ValueError(f"{self.where}: {name} must be {kind}, got {value!r}")
        return value

    def whole(self, name: str, default: Any = MISSING, least: int = 1) -> Any:
        """An integer of at least `least`."""
        is_it = lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least
        return self._typed(name, default, is_it, f"an integer of at least {least}")

    def number(self, name: str, default: Any = MISSING, zero: bool = False) -> Any:
        """A positive (or zero) finite number."""
        is_it = lambda v: _real(v) and (v > 0 or (zero and v == 0))
        return self._typed(name, default, is_it, "a number of at least 0" if zero else "a positive number")

    def flag(self, name: str, default: bool) -> bool:
        return self._typed(name, default, lambda v: isinstance(v, bool), "true or false")

    def text(self, name: str, default: Any = MISSING) -> Any:
        return self._typed(name, default, lambda v: isinstance(v, str), "a string")

    def table(self, name: str) -> dict:
        """A dictionary; empty where it is absent."""
        return self._typed(name, {}, lambda v: isinstance(v, dict), "an object")

    def numbers(self, name: str, default: Any = MISSING) -> Any:
        """A list of positive numbers."""
        is_it = lambda v: isinstance(v, list) and all(_real(x) and x > 0 for x in v)
        return self._typed(name, default, is_it, "a list of positive numbers")

    def expect(self, **plain: Any) -> None:
        """These entries are absent, null, or exactly this."""
        for name, value in plain.items():
            found = self.take(name, value)
            if found != value:
                raise ValueError(
                    f"{self.where}: {name} = {found!r} is not supported for {self.family}, only {value!r} is"
                )

    def done(self) -> None:
        """Refuse what is left, unless it is known to change nothing."""
        self.expect(**PLAIN)
        if self.values.get("quantization_config"):
            raise ValueError(
                f"{self.where} has a quantization_config: the weights are quantised, and only plain float32, float16 "
                "and bfloat16 files are read; take the unquantised model, or its GGUF file"
            )
        for name, value in self.values.items():
            if value is not None and not HARMLESS.fullmatch(name):
                raise ValueError(
                    f"{self.where}: {name} = {value!r} is not an option that our {self.family} knows; remove it from "
                    "the file if it does not change what the model computes"
                )


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
"""Hugging Face's name -> ours. The first of several is the one written, unless a family says otherwise."""


def activation(options: Options, name: str, default: str) -> str:
    value = options.text(name, default)
    if value not in ACTIVATIONS:
        raise ValueError(f"config.json: {name} = {value!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def activation_name(ours: str) -> str:
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)
