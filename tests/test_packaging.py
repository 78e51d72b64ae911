"""An installed package is complete: with programs, models and recipes, and one top-level name, `pretrain`."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, tiny


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the project's wheel is unpacked into, without the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pretrain", "models", "configs"):  # a copy: the build leaves files beside what it builds
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for pattern in ("*.py", "*.toml", "*.in", "README.md", "LICENSE"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, folder / "source")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(folder / "source")], check=True, cwd=folder, timeout=300)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


def run(site: Path, cwd: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Python with the unpacked wheel and without the checkout, from `cwd`."""
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": ""}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_the_wheel_has_one_top_level_name(site: Path) -> None:
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"pretrain", "infobatch_pretrain"}


@pytest.mark.parametrize("command", ["diffusion", pytest.param("mae", marks=pytest.mark.slow)])
def test_both_programs_train_from_an_empty_folder_where_the_user_has_models_too(
    command: str, site: Path, tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise RuntimeError('the user has models of their own')\n")
    where = run(site, tmp_path, "-c", "import pretrain; print(pretrain.HOME)")
    assert where.stdout.strip() == str(site / "pretrain"), where.stderr
    small = ["--data.limit", 64, "--data.held-out", 16, "--batch-size", 16, "--epochs", 2]
    done = run(site, tmp_path, "-m", "pretrain", command, "--infobatch", *tiny(f"train_{command}.py", *small))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / command / "summary.json").is_file()


def test_the_commands_are_listed_without_torch(site: Path, tmp_path: Path) -> None:
    code = "import sys; import pretrain.__main__ as m; sys.argv[1:] = ['-h']; m.main(); print('torch' in sys.modules)"
    done = run(site, tmp_path, "-c", code)
    assert done.stdout.endswith("False\n") and "encode-latents" in done.stdout, done.stderr
    wrong = run(site, tmp_path, "-m", "pretrain", "trian")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "there is no such command" in wrong.stderr
