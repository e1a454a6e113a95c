"""The tour's notebook runs from its first cell to its last, in an empty folder."""

import re

import pytest

from tests.flags import QUICK
from tests.processes import ROOT

NOTEBOOK = ROOT / "experiments" / "notebooks" / "first_steps.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the notebook machinery, which is not ours
def test_the_notebook_runs(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    # The kernel starts JAX itself: what this process set for its own must not decide there. LLVM's effort is no part of it.
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("XLA_FLAGS", QUICK)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}, kernel_name="python3"
    )
    client.execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    text = "\n".join(o.get("text", "") + str(o.get("data", {}).get("text/plain", "")) for o in outputs)
    assert "going on from step 30 of 60" in text
    assert re.search(r"held-out loss \d\.\d+ nats per token after 60 steps", text)
    assert "not divisible" in text or "divide" in text, "the mesh that cannot be was not refused with its numbers"
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert "grad_norm" in text


@pytest.mark.quick
def test_the_notebook_is_clean():
    """No outputs are kept (they would be somebody's machine), and installing leaves a JAX that is there alone."""
    import json

    notebook = json.loads(NOTEBOOK.read_text())
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    install = "".join(notebook["cells"][1]["source"])
    assert 'pins = [f"{n}=={metadata.version(n)}"' in install
