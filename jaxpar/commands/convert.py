"""`jaxpar convert --source MODEL --target FOLDER`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxpar.commands.base import checking, read
from jaxpar.errors import UserError


@dataclass(frozen=True)
class ConvertConfig:
    """Write a model as a Hugging Face folder (config.json and safetensors).

    Attributes:
      source: a run's folder, a Hugging Face folder, or a .gguf file.
      target: the folder to write; new, or empty.
      dtype: of the tensors written.
    """

    source: str = ""
    target: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"


def main(argv: list[str]) -> int | None:
    config = read(ConvertConfig(), argv, prog="jaxpar convert")
    for name in ("source", "target"):
        if not getattr(config, name):
            raise UserError(f"jaxpar convert needs --{name}, see --help")
    target = Path(config.target).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already and not an empty folder; choose another target")
    from jaxpar.loading import load_model
    from jaxpar.models.convert import save_hf

    with checking(), load_model(config.source) as model:
        save_hf(model.cfg, model.params, target, dtype=config.dtype, ids=model.ids, files=model.files)
        print(f"{model.source} -> {target}")
