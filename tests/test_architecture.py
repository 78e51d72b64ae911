"""Imports go down the layers; the maximum size of files and functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# From the top: a folder imports itself and those of the lines below it.
LAYERS = (
    ("__main__", "train_diffusion", "train_mae"),
    ("export",),
    ("training", "evaluation"),
    ("checkpoint",),
    ("data",),
    ("config",),
    ("integrations",),
    ("infobatch", "adapters"),
    ("distributed",),
    ("core",),
)
LEVEL = {name: number for number, names in enumerate(LAYERS) for name in names}
PACKAGE = sorted((ROOT / "pretrain").rglob("*.py"))
FILES = [*PACKAGE, *sorted((ROOT / "models").glob("*.py")), *sorted(ROOT.glob("train_*.py"))]
LONGEST = 80  # lines of a function


def imports(path: Path) -> set[str]:
    """Modules that a file imports; `from pretrain import x` counts as pretrain.x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == "pretrain":
                found |= {f"pretrain.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("pretrain.")} & LEVEL.keys()
    if parts[0] == "models":
        assert not ours, "a network knows nothing of its training"
        return
    own = parts[1] if parts[0] == "pretrain" and len(parts) > 1 else parts[0]
    if own in LEVEL:
        wrong = {name for name in ours if name != own and LEVEL[name] <= LEVEL[own]}
        assert not wrong, f"{'/'.join(parts)} must not import {sorted(wrong)}"
    assert own != "integrations" or ours <= {"integrations", "infobatch", "core"}, "for loops without the rest of this"
    accelerate = any(name.split(".")[0] == "accelerate" for name in imports(path))
    assert not accelerate or parts[1:] in (("distributed", "launch"), ("integrations", "accelerate")), (
        "the loop is handed accelerate's object"
    )


def test_every_folder_says_what_it_is_for() -> None:
    folders = sorted(path for path in (ROOT / "pretrain").iterdir() if path.is_dir() and path.name != "__pycache__")
    assert len(folders) <= 11 and {folder.name for folder in folders} <= LEVEL.keys()
    files = {path.name for path in (ROOT / "pretrain").glob("*.py")}
    assert files == {"__init__.py", "__main__.py"}
    for folder in folders:
        message = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert message and len(message.splitlines()[0]) > 20, folder


def test_integrations_alone_import_their_libraries() -> None:
    for path in FILES:
        theirs = {name.split(".")[0] for name in imports(path)} & {"lightning", "transformers"}
        assert not theirs or path.relative_to(ROOT).parts[:2] in (("pretrain", "integrations"), ("pretrain", "export"))


def test_infobatch_alone_imports_torch_and_numpy_alone() -> None:
    """In a fresh process, from `from pretrain import InfoBatch, Indexed` on."""
    code = (
        "import sys, torch, numpy; before = {*sys.modules}\n"
        "from pretrain import InfoBatch, Indexed\nInfoBatch(8, epochs=1)\n"
        "print(*sorted({name.split('.')[0] for name in {*sys.modules} - before}))\n"
        "print(*sorted(name for name in sys.modules if name.startswith('pretrain.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    others, ours = done.stdout.splitlines()
    assert set(others.split()) - sys.stdlib_module_names <= {"pretrain", "torch", "numpy"}
    assert {name.split(".")[1] for name in ours.split()} <= {"infobatch", "distributed", "core"}


@pytest.mark.parametrize(
    ("pattern", "most"),
    [("pretrain/adapters/[!_]*.py", 100), ("train_*.py", 60), ("pretrain/**/*.py", 460), ("models/*.py", 280)],
)
def test_files_have_a_maximum_length(pattern: str, most: int) -> None:
    for path in ROOT.glob(pattern):
        assert len(path.read_text().splitlines()) <= most, path


def test_functions_have_a_maximum_length() -> None:
    paths = [*FILES, *ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("examples/**/*.py")]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < LONGEST, f"{path}: {node.name}"
                most = 60 if (path.name, node.name) == ("loop.py", "train") else LONGEST
                assert (node.end_lineno or 0) - node.lineno < most


def test_nothing_unpickles_or_trusts_remote_code() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("pickle.load", "pickle.loads", "yaml.load"), path
                careful = ("weights_only", "True") in ((word.arg, ast.unparse(word.value)) for word in node.keywords)
                assert called != "torch.load" or careful, path
                assert not any(keyword.arg == "trust_remote_code" for keyword in node.keywords), path
