"""Reading `config.json`: every option is honoured, known to change nothing, or refused with a sentence."""

from __future__ import annotations

import re
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
    """The entries of one `config.json`, each taken once."""

    def __init__(self, values: dict, family: str):
        self.values = dict(values)
        self.family = family

    def take(self, name: str, default: Any = MISSING) -> Any:
        """The entry, which is then settled; null counts as absent."""
        value = self.values.pop(name, None)
        if value is None and default is MISSING:
            raise ValueError(f"config.json of this {self.family} model has no {name!r}")
        return default if value is None else value

    def number(self, name: str, default: Any = MISSING, whole: bool = True) -> Any:
        """The entry as an int (or a float)."""
        value = self.take(name, default)
        good = isinstance(value, int) if whole else isinstance(value, int | float)
        if value is not default and (isinstance(value, bool) or not good):
            raise ValueError(f"config.json: {name} must be {'an integer' if whole else 'a number'}, got {value!r}")
        return value

    def expect(self, **plain: Any) -> None:
        """These entries are absent, null, or exactly this."""
        for name, value in plain.items():
            found = self.take(name, value)
            if found != value:
                raise ValueError(
                    f"config.json: {name} = {found!r} is not supported for {self.family}, only {value!r} is"
                )

    def done(self) -> None:
        """Refuse what is left, unless it is known to change nothing."""
        self.expect(**PLAIN)
        if self.values.get("quantization_config"):
            raise ValueError(
                "config.json has a quantization_config: the weights are quantised, and only plain float32, float16 "
                "and bfloat16 files are read; take the unquantised model, or its GGUF file"
            )
        for name, value in self.values.items():
            if value is not None and not HARMLESS.fullmatch(name):
                raise ValueError(
                    f"config.json: {name} = {value!r} is not an option that our {self.family} knows; remove it from "
                    "the file if it does not change what the model computes"
                )


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
    value = options.take(name, default)
    if value not in ACTIVATIONS:
        raise ValueError(f"config.json: {name} = {value!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def activation_name(ours: str) -> str:
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)
