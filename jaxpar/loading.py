"""A model to use, from whatever a path holds: a run's folder, a Hugging Face folder, or a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpar.errors import UserError
from jaxpar.models.config import ModelConfig

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)


@dataclass(frozen=True)
class Loaded:
    """A model with what is needed to talk to it.

    Attributes:
      cfg, params: the model.
      encode: text -> token ids, with the begin token where the model was trained with one.
      decode: token ids -> text.
      stop: ids that end a text.
      vocabulary: the number of ids that mean something.
      source: what was read, for messages.
    """

    cfg: ModelConfig
    params: Any
    encode: Any
    decode: Any
    stop: tuple[int, ...]
    vocabulary: int
    source: str


def load(path: str | Path) -> Loaded:
    """Read a model.

    Raises:
      UserError, ValueError, FileNotFoundError: nothing there, or not a model: one sentence.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"there is no model at {path}; give a run's folder, a Hugging Face folder or a .gguf file")
    if path.is_file():
        return _gguf(path)
    if run_checkpoints(path) is not None:
        return _run(path)
    if (path / "config.json").is_file():
        return _huggingface(path)
    raise UserError(
        f"{path} holds no model: neither checkpoints (of a run), nor a config.json (of Hugging Face); it holds "
        f"{', '.join(sorted(p.name for p in path.iterdir())[:5]) or 'nothing'}"
    )


def run_checkpoints(path: Path) -> Path | None:
    """The folder of checkpoints that `path` is or holds."""
    from jaxpar import manifest

    for folder in (path / "checkpoints", path):
        if folder.is_dir() and manifest.steps(folder):
            return folder
    return None


def _run_model(path: Path):
    """The configuration of a run and the parameters of its newest checkpoint, on one device, whatever mesh wrote them."""
    import jax

    from jaxpar import serialise
    from jaxpar.checkpoint import load as load_part
    from jaxpar.config import RunConfig
    from jaxpar.models import decoder, spec

    def target(meta):
        cfg = serialise.from_json(ModelConfig, meta.config["model"], "config.model")
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), spec.abstract(decoder.spec(cfg))
        )

    params, meta = load_part(run_checkpoints(path), "params", target)
    return serialise.from_json(RunConfig, meta.config), params, f"{path}, step {meta.step}"


def _run(path: Path) -> Loaded:
    config, params, label = _run_model(path)
    return _with_tokenizer(config.model, params, config.data.tokenizer.load(), label)


def _huggingface(path: Path) -> Loaded:
    from jaxpar.data.tokenizers import TokenizerFile
    from jaxpar.models import convert

    cfg, params = convert.load_hf(path)
    return _with_tokenizer(cfg, params, TokenizerFile(str(path)).load(), str(path))


def _with_tokenizer(cfg: ModelConfig, params: Any, tokenizer: Any, label: str) -> Loaded:
    def encode(text: str) -> list[int]:
        ids = tokenizer.encode(text).tolist()
        if tokenizer.bos is not None:
            return [tokenizer.bos, *ids]
        return ids or [tokenizer.eod]

    return Loaded(cfg, params, encode, tokenizer.decode, (tokenizer.eod,), min(cfg.vocabulary, tokenizer.size), label)


def _gguf(path: Path) -> Loaded:
    from jaxpar.data import gguf_tokenizer
    from jaxpar.models import convert
    from jaxpar.models.gguf_file import GGUFFile, vocabulary

    words = vocabulary(GGUFFile(path))
    tokenizer = gguf_tokenizer.build(words)
    cfg, params = convert.load_gguf(path)
    return Loaded(
        cfg=cfg,
        params=params,
        encode=lambda text: tokenizer.encode(text).ids,
        decode=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
        stop=tuple(words.stops),
        vocabulary=min(cfg.vocabulary, tokenizer.get_vocab_size()),
        source=str(path),
    )


def load_model(path: str | Path) -> tuple[ModelConfig, Any, str, list[Path]]:
    """The model alone, to write it elsewhere: configuration, parameters, a label, and the tokenizer's files."""
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"there is no model at {path}; give a run's folder, a Hugging Face folder or a .gguf file")
    from jaxpar.models import convert

    if path.is_dir() and run_checkpoints(path) is not None:
        config, params, label = _run_model(path)
        given = Path(getattr(config.data.tokenizer, "path", ""))
        return config.model, params, label, tokenizer_files(given) if given.name else []
    cfg, params = convert.load(path)
    return cfg, params, str(path), tokenizer_files(path)


def tokenizer_files(path: Path) -> list[Path]:
    """The files of a tokenizer, in a folder or given itself."""
    if path.is_dir():
        return [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    return [path] if path.name in TOKENIZER_FILES else []
