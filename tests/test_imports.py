"""Imports go one way, optional packages are imported where they are needed, and a checkout is the installed package."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("jaxpar", "models", "parallel", "pallas_kernels", "experiments")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

MAY_IMPORT = {
    "pallas_kernels": {"pallas_kernels"},
    "models": {"models", "pallas_kernels"},
    "parallel": {"parallel", "pallas_kernels"},
    "jaxpar": {"jaxpar", "models", "parallel", "pallas_kernels"},
    "experiments": {"experiments", "jaxpar", "models", "parallel", "pallas_kernels"},
}
"""Which part of the package a folder may import. `models` and `parallel` do not know each other."""

OPTIONAL = {
    "accelerate", "datasets", "gguf", "huggingface_hub", "IPython", "kubernetes", "matplotlib", "nbclient", "nbformat",
    "pandas", "pyarrow", "scipy", "sentencepiece", "tokenizers", "torch", "transformers", "wandb",
}  # fmt: skip
"""Never imported with a module: in the function that needs them, with an error that names the extra. matplotlib is a
dependency, but takes half a second to import."""


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(tree: ast.AST):
    """`(line, dotted name)` for everything imported anywhere in the tree; `from a import b` gives a.b too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write jaxpar. in full"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def with_the_module(tree: ast.Module):
    """The statements that run when the module is imported: not inside functions, not under `if TYPE_CHECKING`."""

    def walk(statements):
        for node in statements:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from walk(node.orelse)
                continue
            yield node
            for field in ("body", "orelse", "finalbody"):
                yield from walk(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from walk(handler.body)

    for node in walk(tree.body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def part_of(name: str) -> str | None:
    """The folder that a dotted name under `jaxpar` lives in."""
    first, _, rest = name.partition(".")
    if first != "jaxpar":
        return None
    second = rest.partition(".")[0]
    return second if second in FOLDERS else "jaxpar"


def wrong_direction(folder: str, tree: ast.AST) -> list[str]:
    return [
        f"line {line}: {folder} imports {name}"
        for line, name in imported(tree)
        if part_of(name) is not None and part_of(name) not in MAY_IMPORT[folder]
    ]


def wrong_name(tree: ast.AST) -> list[str]:
    """`import models`, `from parallel...`: found when Python starts in the root, and a second copy of the module."""
    return [f"line {line}: {name}" for line, name in imported(tree) if name.split(".")[0] in FOLDERS[1:]]


def optional_with_the_module(tree: ast.Module) -> list[str]:
    return [
        f"line {line}: {name}"
        for node in with_the_module(tree)
        for line, name in imported(node)
        if name.split(".")[0] in OPTIONAL
    ]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_file_imports_what_its_folder_may(path):
    folder, tree = path.relative_to(ROOT).parts[0], parsed(path)
    assert wrong_direction(folder, tree) == []
    assert wrong_name(tree) == []
    # Experiments and benchmarks are programs: they are run by themselves, and may need what they need.
    if folder != "experiments":
        assert optional_with_the_module(tree) == []


def test_tests_use_the_prefix_too():
    for path in sorted((ROOT / "tests").rglob("*.py")):
        assert wrong_name(parsed(path)) == [], relative(path)


@pytest.mark.parametrize(
    ("folder", "code", "finding"),
    [
        ("models", "import jaxpar.parallel.mesh", wrong_direction),
        ("models", "def f():\n    from jaxpar.parallel import mesh", wrong_direction),
        ("models", "from jaxpar import parallel", wrong_direction),
        ("models", "from jaxpar import step", wrong_direction),
        ("parallel", "from jaxpar.models.spec import init", wrong_direction),
        ("parallel", "from jaxpar.errors import UserError", wrong_direction),
        ("pallas_kernels", "import jaxpar.models", wrong_direction),
        ("jaxpar", "from jaxpar.experiments.bench import train_step", wrong_direction),
        ("jaxpar", "from models import spec", wrong_name),
        ("jaxpar", "import parallel.mesh", wrong_name),
        ("jaxpar", "import torch", optional_with_the_module),
        ("jaxpar", "try:\n    import gguf\nexcept ImportError:\n    gguf = None", optional_with_the_module),
        ("jaxpar", "class A:\n    from transformers import AutoModel", optional_with_the_module),
    ],
)
def test_each_check_can_fail(folder, code, finding):
    tree = ast.parse(code)
    assert len(finding(folder, tree) if finding is wrong_direction else finding(tree)) == 1


@pytest.mark.parametrize(
    "code",
    ["def f():\n    import torch", "if TYPE_CHECKING:\n    import gguf", "import modelscope", "import jax.numpy"],
)
def test_what_is_allowed_is_not_found(code):
    tree = ast.parse(code)
    assert wrong_direction("models", tree) + wrong_name(tree) + optional_with_the_module(tree) == []


def packages() -> set[str]:
    """What setup.py declares."""
    scope: dict = {"__file__": str(ROOT / "setup.py")}
    code = (ROOT / "setup.py").read_text().replace("setup(packages", "declared = dict(packages")
    exec(compile(code, "setup.py", "exec"), scope)
    return set(scope["declared"]["packages"])


def test_every_folder_with_code_is_a_declared_package():
    """A folder without `__init__.py` imports from a checkout, and is missing from the wheel."""
    prefixes = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    assert set(prefixes.values()) == set(FOLDERS)
    name_of = {folder: package for package, folder in prefixes.items()}
    expected = set()
    for path in FILES:
        folder, *below = path.parent.relative_to(ROOT).parts
        assert (path.parent / "__init__.py").is_file(), f"{relative(path.parent)} has no __init__.py"
        expected.add(".".join([name_of[folder], *below]))
    assert packages() == expected


def test_what_is_imported_is_declared():
    """Third-party packages imported with a module are dependencies; those inside functions belong to some extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name = lambda text: re.match(r"[\w\-.]+", text)[0].lower().replace("_", "-")
    required = {name(d) for d in project["dependencies"]}
    distributions = importlib.metadata.packages_distributions()
    found: dict[str, str] = {}
    for path in FILES:
        if path.relative_to(ROOT).parts[0] == "experiments":
            continue
        for node in with_the_module(parsed(path)):
            for _, module in imported(node):
                found.setdefault(module.split(".")[0], relative(path))
    parts_of_jax = {"jaxlib", "ml_dtypes"}
    for module, path in found.items():
        if module in sys.stdlib_module_names | parts_of_jax | {"jaxpar"}:
            continue
        owners = {d.lower().replace("_", "-") for d in distributions.get(module, [module])}
        assert owners & required, f"{path} imports {module} ({owners}), which pyproject.toml does not require"


LIST = """
import json, pathlib, pkgutil, sys
import jaxpar, jaxpar.models, jaxpar.parallel, jaxpar.pallas_kernels, jaxpar.experiments
import jaxpar.errors, jaxpar.models.spec, jaxpar.parallel.rules
from jaxpar.parallel import rules
assert rules is sys.modules["jaxpar.parallel.rules"]
assert "jax" not in sys.modules, "importing configurations imports JAX"
packages = sorted(m.name for m in pkgutil.walk_packages(jaxpar.__path__, "jaxpar.") if m.ispkg)
root = str(pathlib.Path(jaxpar.__file__).resolve().parent.parent)
files = {n: m.__file__ for n, m in sys.modules.items() if (getattr(m, "__file__", None) or "").startswith(root)}
# An environment may stand in the checkout: `make train` makes one there.
installed = tuple(str(pathlib.Path(p).resolve()) for p in sys.path if p.rstrip("/").endswith("-packages"))
files = {n: f for n, f in files.items() if not f.startswith(installed)}
ours = {n: f for n, f in files.items() if n.startswith("jaxpar")}
print(json.dumps({"ours": ours, "others": sorted(set(files) - set(ours)), "packages": packages}))
"""


def modules_from(folder: Path) -> dict:
    run = subprocess.run(
        [sys.executable, "-c", LIST], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_checkout_and_the_installed_package_are_the_same_modules(tmp_path):
    """Started in the root, `./jaxpar` shadows what is installed; `jaxpar/__init__.py` makes both the same files."""
    inside, outside = modules_from(ROOT), modules_from(tmp_path)
    assert inside["ours"] == outside["ours"]
    assert len(inside["ours"]) > 8
    for name, file in inside["ours"].items():
        assert Path(file).is_relative_to(ROOT), name


def test_no_module_is_imported_twice_under_two_names():
    """`jaxpar.models.spec` and `models.spec` would be two modules, whose classes are not each other's."""
    found = modules_from(ROOT)
    assert found["others"] == []
    assert {
        p for p in found["packages"] if p.startswith("jaxpar.jaxpar.")
    } == set()  # `jaxpar.jaxpar` cannot be imported
    files = list(found["ours"].values())
    assert len(files) == len(set(files))
    run = subprocess.run([sys.executable, "-c", "import jaxpar.jaxpar"], cwd=ROOT, capture_output=True, text=True)
    assert "ImportError: jaxpar.jaxpar is jaxpar itself" in run.stderr


def test_this_suite_tests_the_checkout():
    import jaxpar

    assert Path(jaxpar.__file__) == ROOT / "jaxpar" / "__init__.py"


def test_a_checkout_that_is_not_installed_imports_too():
    """`-S` leaves out site-packages, and with it the finder of an editable installation."""
    code = "import jaxpar.parallel.rules, jaxpar.models.spec; print(jaxpar.parallel.rules.__file__)"
    run = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(run.stdout.strip()) == ROOT / "parallel" / "rules.py"
