"""Start-up: seconds from the command to its first output and to the first step of training.

Command:   python -m jaxpar.experiments.bench.start_up
Expected:  about a minute and a half on two CPU cores; a table, and results/start_up.json. Goals: `jaxpar --help` below 1 s, the
           first step below 20 s cold and 8 s warm.

"Cold" is a cache folder that does not exist: the standard library is tokenised and every program compiled. "Warm" is the same
command again in a new folder. The first step counts as done when its loss stands in metrics.jsonl. Each figure is the median of
`--repeat` runs; a run is killed once its first step is done.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jaxpar.experiments.bench.train_step import RESULTS, describe

LIMIT = 300.0
"""Seconds after which a first step is not waited for any longer."""


def help_seconds() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "jaxpar", "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def first_step_seconds(folder: Path, cache: Path, words: list[str]) -> float:
    """Seconds until the loss of step 1 is written."""
    metrics = folder / "metrics.jsonl"
    command = [sys.executable, "-m", "jaxpar", "train", *words, "--folder", str(folder), "--progress", "off"]
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"JAXPAR_CACHE": str(cache)}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while time.perf_counter() - start < LIMIT:
            if metrics.is_file() and '"loss"' in metrics.read_text():
                return time.perf_counter() - start
            if process.poll() is not None:
                raise RuntimeError(
                    f"{' '.join(command)} ended with {process.returncode}: {process.stderr.read()[-500:]}"
                )
            time.sleep(0.02)
        raise TimeoutError(f"{' '.join(command)} did not reach its first step in {LIMIT:.0f} s")
    finally:
        process.kill()
        process.communicate()


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each kind")
    parser.add_argument("--out", type=Path, default=RESULTS / "start_up.json", help="the JSON file to write")
    parser.add_argument("words", nargs="*", help="words for `jaxpar train`, after a --")
    options = parser.parse_args(argv)
    help_seconds()  # reads the files once
    found: dict[str, list[float]] = {"help": [help_seconds() for _ in range(options.repeat)], "cold": [], "warm": []}
    for i in range(options.repeat):
        with tempfile.TemporaryDirectory() as place:
            root = Path(place)
            for kind in ("cold", "warm"):
                found[kind].append(first_step_seconds(root / f"{kind}{i}", root / "cache", options.words))
    medians = {kind: statistics.median(seconds) for kind, seconds in found.items()}
    for kind, seconds in medians.items():
        print(f"{kind:<6}{seconds:8.2f} s")
    command = {"command": " ".join(["python -m jaxpar.experiments.bench.start_up", *sys.argv[1:]])}
    about = {**describe(), **command}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**about, "medians": medians, "seconds": found}, indent=1))
    print(f"raw figures: {options.out}")
    return medians


if __name__ == "__main__":
    main()
