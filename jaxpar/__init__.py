"""jaxpar: parallelism and adaptive computation for language models, on JAX.

The five folders at the repository's root install as one import package (`jaxpar`, `jaxpar.models`, `jaxpar.parallel`,
`jaxpar.pallas_kernels`, `jaxpar.experiments`). Importing this module is cheap: it does not import JAX.
"""

from pathlib import Path as _Path

if __name__ != "jaxpar":  # see `__path__` below
    raise ImportError(f"{__name__} is jaxpar itself, found a second time beside its sisters; import jaxpar")

__version__ = "0.1.0"

# In a checkout `./jaxpar` shadows an installed package when Python starts in the root, and `models/` and its
# sisters stand beside it, not below it: let the package look there too, so that both ways import the same modules.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "pallas_kernels").is_dir():
    __path__.append(str(_root))
del _root
