"""The tokenizer that a GGUF file carries, rebuilt from its metadata as a `tokenizers.Tokenizer`.

A GGUF file holds the vocabulary, sometimes the merges, and the names of two rules: the kind of tokenizer and how it
splits text first. What the rules mean is llama.cpp's (`llama-vocab.cpp`). Ids equal those of transformers' own import
of the same file, except where the file says what transformers drops: `add_space_prefix` false, control
tokens that byte-level vocabularies spell outside their alphabet, digits split one by one (SmolLM), and Llama 3's rule
that a word which is a token needs no merges.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from jaxpar.data.tokenizer_files import JsonTokenizer
from jaxpar.errors import UserError
from jaxpar.models.gguf_file import GGUFFile, Vocabulary, vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTROL, USER_DEFINED = 3, 4
SPACE = "\u2581"
GEMMA = ("gemma", "gemma2", "gemma3")

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
}
"""Rules by which byte-level vocabularies split text, by their name in the file."""
GPT2_SPLIT = (None, "default", "gpt-2", "gpt2")
DIGITS_FIRST = ("smollm",)
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken", "pixtral")
"""Vocabularies in which a word that is a token is taken whole, whatever the merges say; the first get a first token."""


def load(path: str | Path, end: str | None = None) -> JsonTokenizer:
    """The tokenizer of a GGUF file.

    Args:
      end: the token that ends a document. None: the file's.

    Raises:
      FileNotFoundError, ValueError: one sentence: no such file, no GGUF file, no vocabulary, an unknown kind.
    """
    found = vocabulary(GGUFFile(path))
    if end is None and found.eos is not None:
        end = found.tokens[found.eos]
    return JsonTokenizer(build(found), end=end, bos=found.bos if found.add_bos else None, name=str(path))


def save(path: str | Path, folder: str | Path) -> list[Path]:
    """Write a GGUF file's tokenizer as `tokenizer.json` and `tokenizer_config.json`, to put beside exported weights.

    Returns:
      The two files.
    """
    found = vocabulary(GGUFFile(path))
    name = lambda i: None if i is None else found.tokens[i]
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name(found.bos),
        "eos_token": name(found.eos),
        "unk_token": name(found.unknown),
        "pad_token": name(found.padding),
        "clean_up_tokenization_spaces": False,
    }
    tokenizer, config = Path(folder) / "tokenizer.json", Path(folder) / "tokenizer_config.json"
    build(found).save(str(tokenizer))
    config.write_text(json.dumps({k: v for k, v in said.items() if v is not None}, indent=2) + "\n", encoding="utf-8")
    return [tokenizer, config]


def build(found: Vocabulary) -> Tokenizer:
    """A tokenizer of this vocabulary, which puts on what the file asks for (`<bos>`) unless told otherwise.

    Raises:
      UserError: the package is missing, or the file names a kind or a rule that is not known.
    """
    try:
        from tokenizers import AddedToken, processors
    except ImportError:
        raise UserError(
            "a GGUF file's tokenizer needs the package tokenizers: pip install 'jaxpar[tokenizers]'"
        ) from None
    if found.model == "gpt2":
        tokenizer = _byte_level(found)
    elif found.model == "llama":
        tokenizer = _gemma(found) if found.architecture in GEMMA else _sentencepiece(found)
    else:
        raise UserError(f"the GGUF file's tokenizer is of the kind {found.model!r}; known are 'llama' and 'gpt2'")

    kept = lambda kind: [t for t, k in zip(found.tokens, found.types, strict=False) if k == kind]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in kept(CONTROL)])
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in kept(USER_DEFINED) if t in known])

    before = [found.bos] if found.add_bos and found.bos is not None else []
    after = [found.eos] if found.add_eos and found.eos is not None else []
    if before or after:
        named = lambda ids: [found.tokens[i] for i in ids]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*named(before), "$A", *named(after)],
            special_tokens=[(found.tokens[i], i) for i in dict.fromkeys(before + after)],
        )
    return tokenizer


def _gemma(found: Vocabulary) -> Tokenizer:
    """SentencePiece without a leading space. Its scores do not order the merges, its ids do."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    # Tokens of several spaces are stored as spaces, unlike all others.
    tokens = [SPACE * len(t) if " " in t and not t.strip() else t for t in found.tokens]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = found.merges or [pair for token in ids for pair in _cuts(token, ids)]
    tokenizer = Tokenizer(_bpe(ids, merges, found.unknown, tokens))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _sentencepiece(found: Vocabulary) -> Tokenizer:
    """Llama 2's kind: the merges follow from the scores."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    ids = {token: i for i, token in enumerate(found.tokens)}
    merges = found.merges
    if not merges:
        if len(found.scores) != len(found.tokens):
            raise UserError(
                f"the GGUF file has {len(found.scores)} scores for {len(found.tokens)} tokens and no merges; without "
                "either its tokenizer cannot be rebuilt"
            )
        score = dict(zip(found.tokens, found.scores, strict=True))
        cuts = [(score[token], len(pair[0]), len(pair[1]), pair) for token in ids for pair in _cuts(token, ids)]
        merges = [pair for *_, pair in sorted(cuts, key=lambda cut: cut[:3], reverse=True)]
    tokenizer = Tokenizer(_bpe(ids, merges, found.unknown, found.tokens))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        SPACE, prepend_scheme="first" if found.space_prefix else "never", split=False
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if found.space_prefix else steps)
    return tokenizer


def _bpe(ids: dict[str, int], merges: list[tuple[str, str]], unknown: int | None, tokens: list[str]):
    from tokenizers import models

    return models.BPE(
        ids, merges, fuse_unk=True, byte_fallback=True, unk_token=None if unknown is None else tokens[unknown]
    )


def _cuts(token: str, ids: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs of tokens that make up this one, the longest first part first."""
    cuts = ((token[:i], token[i:]) for i in range(len(token) - 1, 0, -1))
    return [(a, b) for a, b in cuts if a in ids and b in ids]


def _byte_level(found: Vocabulary) -> Tokenizer:
    """GPT-2's kind: bytes spelled as printable letters, and merges in the file."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if not found.merges:
        raise UserError("the GGUF file has no merges (tokenizer.ggml.merges), which its byte-level vocabulary needs")
    letters = byte_letters()
    alphabet = set(letters)

    def spelled(token: str, kind: int) -> str:
        # Control tokens are looked up whole, so they keep their spelling.
        return token if kind == CONTROL or set(token) <= alphabet else "".join(letters[b] for b in token.encode())

    types = found.types or [1] * len(found.tokens)
    ids = {spelled(token, kind): i for i, (token, kind) in enumerate(zip(found.tokens, types, strict=True))}
    tokenizer = Tokenizer(models.BPE(ids, found.merges, ignore_merges=found.pre in WHOLE_WORDS))
    if found.pre in GPT2_SPLIT:
        split = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif found.pre in DIGITS_FIRST:
        split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif found.pre in SPLITS:
        split = [
            pre_tokenizers.Split(Regex(SPLITS[found.pre]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        known = ", ".join(sorted({*SPLITS, *DIGITS_FIRST, *filter(None, GPT2_SPLIT)}))
        raise UserError(f"the GGUF file splits text by the rule {found.pre!r}; known are {known}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@cache
def byte_letters() -> tuple[str, ...]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the others for letters from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return tuple(chr(b) if b in printable else chr(next(others)) for b in range(256))
