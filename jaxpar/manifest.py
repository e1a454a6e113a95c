"""What makes a folder a complete checkpoint: a manifest with the size and checksum of every file, free of JAX.

    checkpoints/
      jaxpar.json                         marks the folder as ours
      step_00000040/                      one checkpoint: what Orbax writes, and
        manifest.json                     written last, before the folder gets its name by one rename
      step_00000060.orbax-checkpoint-tmp/ a save in progress, or one that was killed
      .trash-step_00000020/               being deleted

A checkpoint is complete if its manifest is there, is itself undamaged, and describes the files that lie beside it.
Orbax's own commit marks say that a save has ended; they cannot say that a file was cut short or lost afterwards.
"""

from __future__ import annotations

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxpar.errors import UserError

FORMAT = "jaxpar checkpoint"
VERSION = 1
MARKER = "jaxpar.json"
MANIFEST = "manifest.json"
TEMPORARY = ".orbax-checkpoint-tmp"
TRASH = ".trash-"
# Orbax rewrites or adds these after the manifest; nothing is read from them.
UNCHECKED = {MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt"}


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read or used here, in one sentence."""


class Damaged(Exception):  # noqa: N818
    """This one checkpoint is incomplete or damaged; the text says how. Others may be fine."""


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step that a folder's name gives, or None for other names (temporary ones too)."""
    digits = folder.name.removeprefix("step_")
    return int(digits) if folder.name.startswith("step_") and digits.isascii() and digits.isdigit() else None


def steps(folder: Path) -> list[int]:
    """Steps with a checkpoint folder, complete or not, in ascending order."""
    if not folder.is_dir():
        return []
    return sorted(step for p in folder.iterdir() if (step := step_of(p)) is not None)


def unfinished(folder: Path) -> list[Path]:
    """Folders of saves that are in progress or were killed."""
    return sorted(p for p in folder.iterdir() if TEMPORARY in p.name) if folder.is_dir() else []


def write_atomically(path: Path, text: str) -> None:
    """All of the text or nothing, also when killed in between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _checksums(paths: list[Path]) -> list[int]:
    with ThreadPoolExecutor(8) as pool:  # zlib releases the interpreter's lock
        return list(pool.map(crc32, paths))


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in UNCHECKED)


def _seal(content: dict) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def write(folder: Path, content: dict) -> None:
    """Writes the manifest: `content` and the size and CRC-32 of every file that lies in `folder`."""
    files = _files(folder)
    sums = _checksums(files)
    table = {str(p.relative_to(folder)): [p.stat().st_size, crc] for p, crc in zip(files, sums, strict=True)}
    content = {"format": FORMAT, "version": VERSION, **content, "files": table}
    write_atomically(folder / MANIFEST, json.dumps({"crc32": _seal(content), "content": content}, indent=1) + "\n")


def read(folder: Path) -> dict:
    """The manifest's content.

    Raises:
      Damaged: there is none, or it was changed.
      CheckpointError: it is of a newer version of the format.
    """
    try:
        sealed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        content = sealed["content"]
        intact = sealed["crc32"] == _seal(content)
    except FileNotFoundError:
        raise Damaged("it has no manifest") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"its manifest is unreadable: {error}") from None
    if not intact:
        raise Damaged("its manifest does not match its own checksum")
    if content["format"] != FORMAT or content["version"] > VERSION:
        raise CheckpointError(
            f"{folder} has format {content['format']!r}, version {content['version']}, but this jaxpar reads "
            f"{FORMAT!r} up to version {VERSION}; install a newer jaxpar"
        )
    return content


def verify(folder: Path) -> dict:
    """The manifest's content, after every file was compared with it (reads all of the checkpoint).

    Raises:
      Damaged: naming the first file that is missing, has another size or another checksum.
    """
    content = read(folder)
    paths = []
    for name, (size, _) in content["files"].items():
        path = folder / name
        paths.append(path)
        try:
            found = path.stat().st_size
        except OSError:
            raise Damaged(f"the file {name} is missing") from None
        if found != size:
            raise Damaged(f"the file {name} has {found} bytes instead of {size}")
    try:
        sums = _checksums(paths)
    except OSError as error:
        raise Damaged(f"a file is unreadable: {error}") from None
    for path, crc, (name, (_, expected)) in zip(paths, sums, content["files"].items(), strict=True):
        if crc != expected:
            raise Damaged(f"the content of {name} changed ({path.stat().st_size} bytes, checksum does not match)")
    return content


def local(folder: str | Path) -> Path:
    """The absolute path. Raises CheckpointError for an address of another kind, as gs://bucket."""
    if "://" in str(folder):
        raise CheckpointError(f"checkpoints are written to local or mounted folders, not to {folder}")
    return Path(folder).absolute()


def own(folder: Path, *, create: bool) -> None:
    """Checks that `folder` is ours; with `create`, makes and marks it where it is new or empty.

    Raises:
      CheckpointError: the folder holds something else, is a file, is missing (without `create`), or is not writable.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; checkpoints need a folder")
    if not folder.exists() and not create:
        raise CheckpointError(f"there is no checkpoint folder {folder}")
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        ours = (folder / MARKER).is_file()
        others = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
        if not ours and others:
            raise CheckpointError(
                f"{folder} holds {len(others)} other things (as {sorted(others)[0]!r}) and no jaxpar checkpoints; "
                "choose another folder"
            )
        if not ours and not create:
            raise CheckpointError(f"{folder} is empty: it holds no jaxpar checkpoints")
        if not ours:
            write_atomically(folder / MARKER, json.dumps({"format": FORMAT, "version": VERSION}) + "\n")
        if create and not os.access(folder, os.W_OK):
            raise PermissionError(f"no permission to write in {folder}")
    except OSError as error:
        raise CheckpointError(f"the checkpoint folder {folder} cannot be used: {error}") from None


def flatten_config(config: dict, prefix: str = "") -> dict:
    """`{"model.width": 128}` from `{"model": {"width": 128}}`."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flatten_config(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(there: dict, here: dict) -> list[str]:
    """Fields that both have and that differ: `"model.width is 128 there and 256 here"`.

    A field that only one side has came or went with a version of jaxpar and is no difference; where a choice brings
    other fields with it (another kind of positions, say), the field that names the choice differs.
    """
    there, here = flatten_config(there), flatten_config(here)
    return [
        f"{name} is {json.dumps(there[name])} there and {json.dumps(here[name])} here"
        for name in sorted(there.keys() & here.keys())
        if there[name] != here[name]
    ]
