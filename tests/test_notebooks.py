"""The notebooks run from start to end, and are stored with small outputs."""

import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import ROOT

import pretrain.__main__

SHORT = {"epochs ": "2", "epochs=": "3", "--data.limit ": "200", "--model.depth ": "1"}
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_stored_outputs_are_small_and_without_errors(path: Path) -> None:
    assert path.stat().st_size < 150_000
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs and [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]


def run_line(line: str) -> None:
    """One line of a shell cell: `python -m pretrain` in this process, which has imported everything; others by bash."""
    words, _, end = line.partition(" > ")
    if not words.startswith("python -m pretrain "):
        subprocess.run(["bash", "-ec", line], check=True)
        return
    words, file = words.partition(" | ")[0], Path(end.strip() or os.devnull)
    with file.open("w") as stream, redirect_stdout(stream), patch("sys.argv", shlex.split(words)[2:]):
        try:
            pretrain.__main__.main()
        except SystemExit as ending:
            assert not ending.code


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer epochs and images, in this process."""
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            source = re.sub(rf"({'|'.join(SHORT)})\d+", lambda found: found[1] + SHORT[found[1]], source)
            if source.startswith("%%bash\n"):
                shell = source.removeprefix("%%bash\n").replace("\\\n", " ")
                for line in shell.replace("--evaluate.every 4", "--evaluate.every 1").splitlines():
                    run_line(line)
            else:
                exec(compile(source, path.name, "exec"), space)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of jupyter's own modules
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings inside it are errors, as in the tests; what it writes to stderr fails the test, too."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    notebook = nbformat.read(path, as_version=4)
    warn = nbformat.v4.new_code_cell("import warnings; warnings.simplefilter('error')")
    notebook.cells.insert(0, warn)
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
