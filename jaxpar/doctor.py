"""`jaxpar doctor`: what is installed, what was tested, what is missing, and the command that mends it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from jaxpar import compile_cache


@dataclass(frozen=True)
class Package:
    """One requirement of the installed project.

    Attributes:
      name: on the package index.
      wanted: the tested range, as `>=0.10.2,<0.13`; empty for any.
      found: the installed version, or None.
      fits: whether `found` is in the range.
      extra: the extra that brings it; None for the core.
    """

    name: str
    wanted: str
    found: str | None
    fits: bool
    extra: str | None


def packages() -> list[Package]:
    """Core packages and extras, from the installed project's metadata."""
    from packaging.requirements import Requirement

    found = []
    for text in metadata.requires("jaxpar") or []:
        requirement = Requirement(text)
        extra = next((e for e in extras() if f'extra == "{e}"' in text.replace("'", '"')), None)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra or ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        wanted = ",".join(sorted(str(s) for s in requirement.specifier)[::-1])
        name = requirement.name + (f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else "")
        found.append(Package(name, wanted, version, fits, extra))
    return found


def extras() -> list[str]:
    """The project's extras."""
    return metadata.metadata("jaxpar").get_all("Provides-Extra") or []


def doctor(say: Callable[[str], None] = print) -> int:
    """Prints the report. Returns the exit code: 0 if a run can start, else 1."""
    problems: list[str] = []
    version = sys.version.split()[0]
    say(f"jaxpar {_version('jaxpar')}, Python {version}, {platform.platform()}")
    _packages(say, problems)
    _devices(say, problems)
    _folders(say)
    for problem in problems:
        say(f"problem: {problem}")
    say("everything that a run needs is here" if not problems else f"{len(problems)} to mend before a run can start")
    return 1 if problems else 0


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _packages(say, problems: list[str]) -> None:
    try:
        listed = packages()
    except metadata.PackageNotFoundError:
        problems.append("jaxpar itself is not installed; in its folder: pip install -e .")
        return
    except ImportError as error:
        problems.append(f"{error.name} is missing; install it with: pip install {error.name}")
        return
    say("\npackages, and the range that is tested:")
    for p in (p for p in listed if p.extra is None):
        state = "missing" if p.found is None else "ok" if p.fits else "outside"
        say(f"  {p.name:<18} {p.found or '-':<12} {p.wanted:<18} {state}")
        if state != "ok":
            problems.append(
                f"{p.name} is {'missing' if p.found is None else p.found}, tested is {p.wanted or 'any'}; "
                f"pip install '{p.name}{p.wanted}'"
            )
    say("\nextras:")
    for extra in extras():
        missing = [p.name for p in listed if p.extra == extra and not _there(p)]
        if missing:
            say(f"  {extra:<18} pip install 'jaxpar[{extra}]'   (lacks {', '.join(missing)})")
        else:
            say(f"  {extra:<18} installed")


def _there(p: Package) -> bool:
    # jax[cuda13] is there if its plugin is, which has a package of its own.
    plugins = {"jax[cuda13]": "jax-cuda13-plugin", "jax[tpu]": "libtpu"}
    return p.fits and (p.name not in plugins or _version(plugins[p.name]) != "(not installed)")


def _devices(say, problems: list[str]) -> None:
    try:
        import jax

        devices = jax.local_devices()
    except Exception as error:
        problems.append(f"JAX found no device: {str(error).splitlines()[0]}")
        return
    from jaxpar import flops

    kinds: dict[str, int] = {}
    for device in devices:
        kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
    say("\ndevices:")
    for kind, n in kinds.items():
        peak = flops.peak(kind)
        rate = f", {peak / 1e12:,.0f} TFLOP/s each in bfloat16 at most" if peak else ""
        say(f"  {n} x {kind}{rate}")
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        say(f"  {limit / 1e9:.1f} GB each")
    say(f"  {os.cpu_count()} CPU cores{_memory()}")
    if devices[0].platform == "cpu":
        say("  no accelerator: small models train here, and --fake-devices 8 tries any mesh")
        if shutil.which("nvidia-smi"):
            say("  an NVIDIA driver is installed, but JAX does not use it: pip install 'jaxpar[cuda]'")


def _memory() -> str:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return ""
    return f", {pages * size / 1e9:.1f} GB of memory"


def _folders(say) -> None:
    path = compile_cache.folder()
    why = compile_cache.problem(path)
    files, size = compile_cache.size(path)
    say("\nfolders:")
    state = f"{files} files, {size / 1e6:,.0f} MB" if why is None else f"cannot be written to ({why}): set JAXPAR_CACHE"
    say(f"  compiled programs  {path}: {state}")
    free = shutil.disk_usage(".").free
    say(f"  this folder        {os.getcwd()}: {free / 1e9:,.1f} GB free\n")
