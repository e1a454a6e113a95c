"""A model to use, from whatever a path holds: a run's folder, a Hugging Face folder, or a GGUF file."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxpar.errors import UserError
from jaxpar.models.config import ModelConfig


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
    """The configuration of a run and the parameters of its newest checkpoint, on one device, whatever mesh wrote them.

    Where the run keeps an average of its parameters it is the average, as in the run's own evaluation and sample.
    """
    import jax
    import jax.numpy as jnp

    from jaxpar import serialise
    from jaxpar.checkpoint import load as load_part
    from jaxpar.config import RunConfig
    from jaxpar.models import decoder, spec
    from jaxpar.steps.ema import EMA, corrected

    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    there = lambda s, dtype=None: jax.ShapeDtypeStruct(s.shape, dtype or s.dtype, sharding=sharding)
    abstract = lambda meta: spec.abstract(
        decoder.spec(serialise.from_json(ModelConfig, meta.config["model"], "config.model"))
    )

    def average(meta):
        leaves = jax.tree.map(lambda s: there(s, jnp.float32), abstract(meta))
        return {"average": leaves, "count": there(jax.ShapeDtypeStruct((), jnp.int32))}

    folder = run_checkpoints(path)
    params, meta = load_part(folder, "params", lambda meta: jax.tree.map(there, abstract(meta)))
    config, label = serialise.from_json(RunConfig, meta.config), f"{path}, step {meta.step}"
    if config.step.ema is not None:
        # A run that is writing may have saved again: what is averaged then is newer, and whole in itself.
        slot, meta = load_part(folder, f"slots/{EMA}", average)
        params = jax.jit(corrected, static_argnums=2)(slot, params, config.step.ema.decay)
        label = f"{path}, step {meta.step}, averaged parameters"
    return config, params, label


def _run(path: Path) -> Loaded:
    config, params, label = _run_model(path)
    return _with_tokenizer(config.model, params, config.data.tokenizer.load(), label)


def _huggingface(path: Path) -> Loaded:
    from jaxpar.data.tokenizers import TokenizerFile
    from jaxpar.models import convert

    cfg, params = convert.load_hf(path)
    loaded = _with_tokenizer(cfg, params, TokenizerFile(str(path)).load(), str(path))
    # A model may end a text in several ways (a document, a turn).
    return replace(loaded, stop=tuple({*loaded.stop, *convert.token_ids(path).stops}))


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


@dataclass(frozen=True)
class Model:
    """A model to be written elsewhere.

    Attributes:
      cfg, params: the model.
      ids: begin, end and padding ids, as `jaxpar.models.convert.TokenIds`.
      files: the tokenizer's files.
      source: what was read, for messages.
    """

    cfg: ModelConfig
    params: Any
    ids: Any
    files: list[Path]
    source: str


@contextlib.contextmanager
def load_model(path: str | Path) -> Iterator[Model]:
    """The model alone, with its tokenizer's files (which may be made for the time of the `with` block)."""
    from jaxpar.models import convert

    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"there is no model at {path}; give a run's folder, a Hugging Face folder or a .gguf file")
    if path.is_dir() and run_checkpoints(path) is not None:
        config, params, label = _run_model(path)
        tokenizer = config.data.tokenizer.load()
        ids = convert.TokenIds(bos=tokenizer.bos, stops=(tokenizer.eod,))
        given = Path(getattr(config.data.tokenizer, "path", "")).expanduser()
        files = convert.tokenizer_files(given) if given.is_dir() else [given] if given.is_file() else []
        yield Model(config.model, params, ids, files, label)
        return
    cfg, params = convert.load(path)
    ids = convert.token_ids(path)
    if path.is_dir():
        yield Model(cfg, params, ids, convert.tokenizer_files(path), str(path))
        return
    from jaxpar.data import gguf_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        yield Model(cfg, params, ids, gguf_tokenizer.save(path, Path(folder)), str(path))
