"""The notebooks run from start to end, and are stored with small outputs."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SHORT = {"epochs ": "2", "epochs=": "3", "--data.limit ": "200"}
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_stored_outputs_are_small_and_without_errors(path: Path) -> None:
    assert path.stat().st_size < 150_000
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs and [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]


@pytest.mark.filterwarnings("default")  # of jupyter's own modules
@pytest.mark.parametrize("short", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["short", "whole"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, short: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings inside it are errors, as in the tests; what it writes to stderr fails the test, too."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells if short else ():
        shortened = re.sub(r"(epochs[ =]|--data.limit )\d+", lambda found: found[1] + SHORT[found[1]], cell.source)
        cell.source = shortened.replace("--evaluate.every 4", "--evaluate.every 1")
    warn = nbformat.v4.new_code_cell("import warnings; warnings.simplefilter('error')")
    notebook.cells.insert(0, warn)
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
