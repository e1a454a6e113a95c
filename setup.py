"""Lists the packages: five folders at the root become one import package, `jaxpar`.

Everything else stands in pyproject.toml. A list kept by hand would go stale with each new folder.
"""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
FOLDERS = {
    "jaxpar": "jaxpar",
    "jaxpar.models": "models",
    "jaxpar.parallel": "parallel",
    "jaxpar.pallas_kernels": "pallas_kernels",
    "jaxpar.experiments": "experiments",
}


def packages() -> list[str]:
    found = []
    for package, folder in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("__init__.py")):
            found.append(".".join([package, *file.parent.relative_to(ROOT / folder).parts]))
    return found


setup(packages=packages())
