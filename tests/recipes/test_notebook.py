"""The notebook, top to bottom, in a real kernel."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "recipes" / "notebook.ipynb"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_notebook_runs(tiny_folder, monkeypatch):
    monkeypatch.setenv("ROLLOUT_SERVER_NOTEBOOK_MODEL", tiny_folder)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, timeout=500, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error"]
    shown = [o.data for o in outputs if "data" in o]
    assert any("image/png" in data for data in shown), "there is no plot of the reward"
    tables = [data["text/html"] for data in shown if "text/html" in data]
    assert any("RolloutServer" in html and "awake" in html for html in tables)
