"""What `jaxpar tune` does: block sizes compiled for a chip, timed where it is here, and the fastest put into the cache."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxpar.errors import UserError


def _positive(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} = {size}; give at least 1")


def _named(op, implementation: str) -> tuple[str, dict]:
    """The kernel that is meant, and the op's sizes.

    Raises:
      ValueError: a kernel of another platform.
    """
    sizes = dict(vars(op))
    name = sizes.pop("kernel") or implementation
    if not name.startswith(implementation):
        raise ValueError(f"{name} is a kernel for another platform than {implementation}; leave out kernel")
    return name, sizes


@dataclass(frozen=True)
class Attention:
    """Causal attention, forward and backward. The defaults are Llama 3 8B's.

    Attributes:
      batch: rows.
      queries: tokens in a row.
      keys: tokens in a row; None: as many as queries. The queries are the last of them.
      heads: of queries.
      key_heads: of keys and values.
      head_size: of each head.
      window: how many tokens a query sees back, itself included; None: all.
      dtype: of queries, keys and values.
    """

    batch: int = 1
    queries: int = 4096
    keys: int | None = None
    heads: int = 32
    key_heads: int = 8
    head_size: int = 128
    window: int | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self):
        _positive(batch=self.batch, queries=self.queries, keys=self.keys, heads=self.heads, window=self.window)
        _positive(key_heads=self.key_heads, head_size=self.head_size)

    def subject(self, kind: str, implementation: str, interpret: bool = False):
        """The `search.Subject` for a kind of device and its kernels."""
        from jaxpar.pallas_kernels.tuning import subjects

        sizes = vars(self) | {"keys": self.keys or self.queries}
        return subjects.attention(kind, implementation, **sizes, interpret=interpret)


@dataclass(frozen=True)
class QuantMatmul:
    """Products with quantised weights. The defaults are the first feed-forward product of Llama 3 8B.

    Attributes:
      rows: tokens.
      inputs: what is summed over.
      outputs: columns of the weights.
      weights: their format, such as int4_g128 or int8_row.
      activations: their format, such as int8_row; None: they are in `dtype`.
      dtype: of activations that have no format, and of what comes out.
      kernel: another one than the one that is chosen without a name, such as mosaic_gpu_codes.
    """

    rows: int = 16
    inputs: int = 4096
    outputs: int = 14336
    weights: str = "int4_g128"
    activations: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    kernel: Literal["mosaic_gpu_codes"] | None = None

    def __post_init__(self):
        _positive(rows=self.rows, inputs=self.inputs, outputs=self.outputs)

    def subject(self, kind: str, implementation: str, interpret: bool = False):
        """The `search.Subject` for a kind of device and its kernels."""
        from jaxpar.pallas_kernels.tuning import subjects

        name, sizes = _named(self, implementation)
        return subjects.quant_matmul(kind, name, **sizes, interpret=interpret)


@dataclass(frozen=True)
class DecodeAttention:
    """A few queries a row with full key/value caches. The defaults are Llama 3 8B's.

    Attributes:
      batch: rows.
      slots: of a row's cache.
      queries: of each row.
      heads: of queries.
      key_heads: of keys and values.
      head_size: of each head.
      cache: the format of keys and values, such as int8_row or int4_row; None: they are in `dtype`.
      dtype: of queries, and of keys and values that have no format.
      kernel: another one than the one that is chosen without a name, such as mosaic_gpu_codes.
    """

    batch: int = 8
    slots: int = 32768
    queries: int = 1
    heads: int = 32
    key_heads: int = 8
    head_size: int = 128
    cache: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    kernel: Literal["mosaic_gpu_codes"] | None = None

    def __post_init__(self):
        _positive(batch=self.batch, slots=self.slots, queries=self.queries, heads=self.heads)
        _positive(key_heads=self.key_heads, head_size=self.head_size)

    def subject(self, kind: str, implementation: str, interpret: bool = False):
        """The `search.Subject` for a kind of device and its kernels."""
        from jaxpar.pallas_kernels.tuning import subjects

        name, sizes = _named(self, implementation)
        return subjects.decode_attention(kind, name, **sizes, interpret=interpret)


OPS = {"attention": Attention, "quant_matmul": QuantMatmul, "decode_attention": DecodeAttention}
KERNELS = {"tpu": "mosaic_tpu", "gpu": "mosaic_gpu"}
"""The kernels of each platform."""


@dataclass(frozen=True)
class TuneConfig:
    """What is tuned, and where the result goes.

    Attributes:
      op: the op and its shape.
      topology: a TPU slice that need not be there, such as v5e:2x2: what compiles for one of its chips is listed, and
        nothing timed (extra tpu-aot).
      dry_run: list what compiles for the chip that is here, time and write nothing.
      cache: the file to write. None: the one that JAXPAR_TUNE_CACHE names, else a file of the chip's beside the compiled programs.
      rounds: samples of each candidate that are counted.
    """

    op: Attention | QuantMatmul | DecodeAttention = Attention()
    topology: str | None = None
    dry_run: bool = False
    cache: str | None = None
    rounds: int = 15

    def __post_init__(self):
        if self.rounds < 3:
            raise ValueError(f"rounds = {self.rounds}; give at least 3, or the median is one sample")


def tune(config: TuneConfig, say: Callable[[str], None] = print) -> None:
    """Prints the candidates, and writes the best to the cache where they could be timed.

    Raises:
      UserError: no chip that the kernels run on, and no topology; a cache that cannot be added to.
      ValueError: a shape that the kernels do not do.
    """
    import jax

    from jaxpar.pallas_kernels.tiles import chip
    from jaxpar.parallel.topology import tpu_devices

    if config.topology is not None:
        device, listed = tpu_devices(config.topology)[0], True
    else:
        device, listed = jax.local_devices()[0], config.dry_run
        if device.platform not in KERNELS:
            raise UserError(
                f"jaxpar tune measures kernels on a TPU or an NVIDIA GPU, and here is a {device.device_kind}; --topology v5e:2x2 "
                "lists what compiles for a chip that is not there"
            )
    short = chip(device.device_kind)
    if short is None:
        raise UserError(f"the block tables know no {device.device_kind}")
    subject = config.op.subject(device.device_kind, KERNELS[device.platform])
    if listed:
        from jaxpar.pallas_kernels.tuning import search

        say(headline(subject, short))
        search.tried(subject, device, say=lambda one: say(line(one)))
        say("compiled only: nothing was timed, and nothing is written")
        return
    measure(subject, short, device, config, say)


def measure(subject, short: str, device: Any, config: TuneConfig, say: Callable[[str], None] = print, **tools) -> Path:
    """Compile, time, choose, write; returns the cache's file.

    Args:
      tools: `compiler` and `sampler` in place of `search`'s own.

    Raises:
      UserError, ValueError: as `tune`.
    """
    import jax

    from jaxpar.pallas_kernels.tuning import cache, search

    path = Path(config.cache).expanduser().absolute() if config.cache else cache.named() or cache.default(short)
    _writable(path)
    known = cache.Cache(short, jax.__version__, driver(device))
    if path.exists():
        known = cache.read(path)
        cache.check(known, short, path)
    compiler = {"compiler": tools["compiler"]} if "compiler" in tools else {}
    sampler = {"sampler": tools["sampler"]} if "sampler" in tools else {}
    say(headline(subject, short))
    candidates = search.tried(subject, device, say=lambda one: None, **compiler)
    search.timed(subject, candidates, rounds=config.rounds, **sampler)
    for one in candidates:
        say(line(one))
    tiles = search.best(subject, candidates)
    record = {
        "date": datetime.date.today().isoformat(),
        "shape": {name: value for name, value in vars(config.op).items() if value is not None},
        "seconds": {one.part: one.median for one in candidates if one.seconds and _chosen(one, tiles)},
        "table_seconds": {one.part: one.median for one in candidates if one.seconds and one.in_table},
        "rounds": config.rounds,
    }
    entry = cache.Entry(
        subject.op,
        subject.implementation,
        subject.dtype,
        cache.shape_class(subject.sizes),
        tuple(sorted(vars(tiles).items())),
        tuple(record.items()),
    )
    cache.write(path, known.with_entry(entry))
    say(f"best: {tiles}")
    for part, seconds in record["seconds"].items():
        before = record["table_seconds"].get(part)
        beside = f", {before / seconds:.3f} times as fast as the table's" if before else "; the table's do not compile"
        say(f"  {part}: {1e3 * seconds:.3f} ms{beside}")
    say(f"written to {path}, for {subject.op} in {subject.dtype} of sizes up to {dict(entry.sizes)}")
    return path


def _chosen(one, tiles) -> bool:
    return all(getattr(tiles, name) == size for name, size in one.sizes.items())


def _writable(path: Path) -> None:
    from jaxpar import compile_cache

    if path.is_dir():
        raise UserError(f"the tuning cache {path} is a folder; name a file")
    if why := compile_cache.problem(path.parent):
        raise UserError(f"the tuning cache {path} cannot be written ({why}); give another --cache")


def driver(device: Any) -> str:
    """The version of the chip's driver or runtime, as its platform names it."""
    return str(getattr(device.client, "platform_version", "unknown")).strip().replace("\n", "; ")


def headline(subject, short: str) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in subject.sizes.items())
    names = f"{'part':<10}{'block sizes':<34}{'compile s':>10}{'VMEM MB':>9}{'temp MB':>9}{'ms':>10}"
    return f"{subject.op} by {subject.implementation} for a {short}, {subject.dtype}: {sizes}\n{names}"


def line(one) -> str:
    """A candidate's row."""
    sizes = ", ".join(f"{name} {size}" for name, size in one.sizes.items()) + (" *" if one.in_table else "")
    start = f"{one.part:<10}{sizes:<34}{one.compile_s:>10.1f}"
    if one.refused:
        return f"{start}  does not compile: {one.refused}"
    vmem = "-" if one.vmem_bytes is None else f"{one.vmem_bytes / 1e6:.2f}"
    ms = f"{1e3 * one.median:.3f}" if one.seconds else "-"
    return f"{start}{vmem:>9}{one.temporary_bytes / 1e6:>9.2f}{ms:>10}"
