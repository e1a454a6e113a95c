"""Tokenised text on disk: built once, renamed into place whole, memory-mapped afterwards.

A cache is a folder named by the fingerprint of all that decides its contents (what the source holds, the tokenizer, the
split). It holds, for each split, one flat file of token ids (each document followed by its end), the place where each
document starts, and each document's weight. It is written under another name and renamed at the end: being killed while
it is written leaves a folder that the next build removes, and two builders do no harm to each other.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import sys
import time
import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxpar.data.config import DataConfig, cache_dir
from jaxpar.data.sources.base import Document, manifest
from jaxpar.data.tokenizers import Tokenizer
from jaxpar.errors import UserError

FORMAT = 2
SPLITS = ("train", "validation")
META = "meta.json"
BATCH = 64
"""Documents that are tokenised together."""
STALE = 24 * 3600.0
"""Seconds after which an unfinished folder belongs to nobody."""
BLOCK = 16 * 2**20
"""Bytes of tokens under one check sum."""
CHECKED = 256 * 2**20
"""Bytes of tokens that are checked in full when they are opened (0.1 s); of more, the first and the last block."""


@dataclass(frozen=True)
class Stream:
    """One split. N documents, n tokens.

    Attributes:
      tokens: [n] token ids, memory-mapped; each document ends with the end-of-document id.
      starts: int64 [N + 1], where each document starts, and n.
      weights: float32 [N], the loss weight of each document.
      digest: of all three: equal for equal contents, wherever and whenever they were made.
    """

    tokens: np.ndarray
    starts: np.ndarray
    weights: np.ndarray
    digest: str = ""


def fingerprint(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the contents of the cache, as plain values."""
    held_out = config.validation_source
    return {
        "format": FORMAT,
        "source": manifest(config.source),
        "validation_source": None if held_out is None else manifest(held_out),
        "validation_fraction": None if held_out is not None else config.validation_fraction,
        "tokenizer": tokenizer.identity,
        "end": tokenizer.eod,
    }


def digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=12).hexdigest()


def is_held_out(text: bytes, fraction: float) -> bool:
    """By the contents alone: the same on all machines, whatever other documents there are."""
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return number < fraction * 2**64


def open_or_build(
    config: DataConfig, tokenizer: Tokenizer, say: Callable[[str], None] = print
) -> tuple[dict[str, Stream], str]:
    """Both splits, and the name of the folder that holds them.

    Raises:
      UserError: an empty corpus, a document that cannot be read, or no space.
    """
    content = fingerprint(config, tokenizer)
    name = digest(content)
    folder = cache_dir(config) / name
    # Three times: another process may find the same damage, and remove what this one has just built.
    for _ in range(3):
        if folder.exists():
            try:
                return _open(folder), name
            except _TornError as torn:
                say(f"the tokenised cache {folder} is damaged ({torn}); it is built again")
                _remove(folder)
        try:
            _build(config, tokenizer, folder, content)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"no space left for the tokenised text in {folder.parent}; free some, or choose another folder "
                    "with --data.cache-dir (nothing was left behind)"
                ) from None
            raise UserError(
                f"cannot write the tokenised text to {folder.parent} ({error.strerror or error}); choose another "
                "folder with --data.cache-dir"
            ) from None
    try:
        return _open(folder), name
    except _TornError as torn:
        raise UserError(f"the tokenised cache {folder} cannot be replaced ({torn}); remove it by hand") from None


class _TornError(Exception):
    """A cache whose files are not as they were written."""


def _open(folder: Path) -> dict[str, Stream]:
    try:
        meta = json.loads((folder / META).read_text())
        found = {}
        for split in SPLITS:
            wanted = meta["splits"][split]
            for file, size in wanted["files"].items():
                there = (folder / file).stat().st_size
                if there != size:
                    raise _TornError(f"{file} has {there} of {size} bytes")
            starts = np.load(folder / f"{split}.starts.npy")
            weights = np.load(folder / f"{split}.weights.npy")
            if _checksum(starts, weights) != wanted["checksum"]:
                raise _TornError(f"the table of {split} documents has another checksum")
            dtype = np.dtype(wanted["dtype"])
            count = int(starts[-1])
            # An empty file cannot be mapped.
            tokens = np.memmap(folder / f"{split}.tokens", dtype, "r", shape=(count,)) if count else np.empty(0, dtype)
            _check_tokens(f"{split}.tokens", tokens, wanted["crc32"])
            found[split] = Stream(tokens, starts, weights, wanted["digest"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
        raise _TornError(str(error)) from None
    return found


def _check_tokens(name: str, tokens: np.ndarray, sums: list[int]) -> None:
    data = np.asarray(tokens).view(np.uint8)
    blocks = -(-len(data) // BLOCK)
    if len(sums) != blocks:
        raise _TornError(f"{META} has {len(sums)} check sums for the {blocks} blocks of {name}")
    for i in range(blocks) if len(data) <= CHECKED else (0, blocks - 1):
        if zlib.crc32(data[i * BLOCK : (i + 1) * BLOCK]) != sums[i]:
            raise _TornError(f"{name} has another check sum, near byte {i * BLOCK}")


def _checksum(*arrays: np.ndarray) -> str:
    hashed = hashlib.blake2b(digest_size=8)
    for values in arrays:
        hashed.update(values.tobytes())
    return hashed.hexdigest()


def _build(config: DataConfig, tokenizer: Tokenizer, folder: Path, content: Any) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder.parent)
    work = folder.parent / f".{folder.name}.{_host()}.{os.getpid()}.{time.time_ns()}.tmp"
    work.mkdir()
    try:
        dtype = np.dtype(np.uint16 if tokenizer.size <= 2**16 else np.uint32)
        with contextlib.ExitStack() as stack:
            writers = {split: _SplitWriter(work, split, dtype, stack) for split in SPLITS}
            _tokenise(config, tokenizer, writers)
        if fingerprint(config, tokenizer) != content:
            changed = " or ".join(s.describe() for s in (config.source, config.validation_source) if s is not None)
            raise UserError(f"{changed} changed while it was being tokenised; run again")
        meta = {"content": content, "splits": {split: w.finish() for split, w in writers.items()}}
        _write_synced(work / META, json.dumps(meta).encode())
        # Another process may have been faster: its folder holds the same.
        with contextlib.suppress(FileExistsError, NotADirectoryError):
            try:
                work.rename(folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
    finally:
        _remove(work)


class _SplitWriter:
    """Collects one split."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, stack: contextlib.ExitStack):
        self.folder, self.split, self.dtype = folder, split, dtype
        self.file = stack.enter_context(open(folder / f"{split}.tokens", "wb"))
        # Arrays and not lists: there may be a hundred million documents.
        self.lengths = array("q")
        self.weights = array("f")
        self.hashed = hashlib.blake2b(digest_size=12)

    def add(self, ids: np.ndarray, weight: float) -> None:
        data = ids.astype(self.dtype).tobytes()
        self.file.write(data)
        self.hashed.update(data)
        self.lengths.append(len(ids))
        self.weights.append(weight)

    def finish(self) -> dict[str, Any]:
        lengths = np.frombuffer(self.lengths, np.int64) if self.lengths else np.empty(0, np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        weights = np.asarray(self.weights, np.float32)
        np.save(self.folder / f"{self.split}.starts.npy", starts)
        np.save(self.folder / f"{self.split}.weights.npy", weights)
        names = [f"{self.split}{end}" for end in (".tokens", ".starts.npy", ".weights.npy")]
        for name in names:
            _sync(self.folder / name)
        return {
            "files": {name: (self.folder / name).stat().st_size for name in names},
            "checksum": (checksum := _checksum(starts, weights)),
            "crc32": _crc32(self.folder / names[0]),
            "digest": digest([self.hashed.hexdigest(), checksum, self.dtype.name]),
            "dtype": self.dtype.name,
        }


def _crc32(file: Path) -> list[int]:
    """Of each block."""
    with open(file, "rb") as f:
        return [zlib.crc32(block) for block in iter(lambda: f.read(BLOCK), b"")]


def _tokenise(config: DataConfig, tokenizer: Tokenizer, writers: dict[str, _SplitWriter]) -> None:
    sources = [(config.source, None if config.validation_source is None else "train")]
    if config.validation_source is not None:
        sources.append((config.validation_source, "validation"))
    for source, split in sources:
        bar = _Bar(f"tokenising {source.describe()}")
        pending: list[Document] = []
        count = 0

        def flush(split=split, pending=pending):
            for document, ids in zip(pending, tokenizer.encode_batch([d.text for d in pending]), strict=True):
                if len(ids) and int(ids.max()) >= tokenizer.size:
                    raise UserError(
                        f"{document.name}: the tokenizer gave id {int(ids.max())}, beyond its own {tokenizer.size} ids"
                    )
                held_out = is_held_out(document.text, config.validation_fraction)
                writer = writers[split or ("validation" if held_out else "train")]
                start = [] if tokenizer.bos is None else [tokenizer.bos]
                writer.add(np.concatenate([start, ids, [tokenizer.eod]]).astype(np.int64), document.weight)
            pending.clear()

        with bar:
            for document in source.documents():
                _check_bytes(document, tokenizer)
                pending.append(document)
                count += 1
                if len(pending) == BATCH:
                    flush()
                    bar.update(document.done)
            flush()
        if not count:
            raise UserError(f"{source.describe()}: there is no text in it")


def _check_bytes(document: Document, tokenizer: Tokenizer) -> None:
    if tokenizer.accepts_bytes:
        return
    try:
        document.text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{document.name} is not UTF-8 (byte {error.start}); convert it, or use --tokenizer bytes, which takes any data"
        ) from None


class _Bar:
    """Progress of a build: nothing for the first second, so that a small corpus is quiet; then a bar in a terminal or
    notebook, and a line every ten seconds elsewhere."""

    def __init__(self, text: str, every: float = 10.0, clock: Callable[[], float] = time.monotonic):
        self.text, self.every, self.clock = text, every, clock

    def __enter__(self) -> _Bar:
        from jaxpar.report.progress import choose

        self._began = self._printed = self.clock()
        self._bar = None
        if choose("auto", sys.stderr) != "lines":
            from tqdm import tqdm

            self._bar = tqdm(
                total=100, desc=self.text, unit="%", delay=1.0, leave=False, bar_format="{l_bar}{bar}| {elapsed}"
            )
        return self

    def update(self, done: float) -> None:
        """`done`: the part of the source that was read, from 0 to 1."""
        if self._bar is not None:
            self._bar.update(max(0, int(100 * done) - self._bar.n))
        elif (now := self.clock()) - self._printed >= self.every:
            from jaxpar.report.progress import duration

            self._printed = now
            left = duration((now - self._began) * (1 - done) / done) if done > 0 else "?"
            print(f"{self.text}: {done:.0%}, {left} left", file=sys.stderr, flush=True)

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()


def _sweep(parent: Path) -> None:
    """Remove what killed builds left long ago. A younger one may belong to a process that is at work."""
    for path in parent.glob(".*.tmp"):
        with contextlib.suppress(OSError, ValueError):
            host, owner = path.name.split(".")[2:4]
            dead = host == _host() and not _alive(int(owner))
            if dead or time.time() - path.stat().st_mtime > STALE:
                _remove(path)


def _host() -> str:
    """A process number says something only on its own machine; the disk may be shared by several."""
    return digest(socket.gethostname())[:8]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
