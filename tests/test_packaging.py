"""An installed package is complete: with programs, models and recipes, and one top-level name, `pretrain`."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from importlib import metadata
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


def test_the_wheel_has_all_files_of_the_package_and_no_others(site: Path) -> None:
    def files(folder: Path, base: Path) -> set[str]:
        paths = {path.relative_to(base) for path in folder.rglob("*") if path.is_file()}
        return {str(path) for path in paths if "__pycache__" not in path.parts and path.suffix}

    found = files(site / "pretrain", site / "pretrain")
    wanted = files(ROOT / "pretrain", ROOT / "pretrain") | files(ROOT / "models", ROOT) | files(ROOT / "configs", ROOT)
    assert (site / "pretrain" / "data" / "fashion_mnist" / "LICENSE").is_file()
    assert found == wanted | {f"train_{kind}.py" for kind in ("diffusion", "mae")}


def requirements(*names: str) -> set[str]:
    """These distributions and all that they require without extras."""
    found: set[str] = set()
    queue = [*names]
    while queue:
        name = re.split(r"[^\w.-]", queue.pop())[0].lower()
        with suppress(metadata.PackageNotFoundError):  # of another platform
            required = [] if name in found else metadata.requires(name) or []
            found.add(name)
            queue += [item for item in required if "extra ==" not in item]
    return found


@pytest.fixture(scope="module")
def bare_site(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site-packages with the wheel, torch and numpy and what these two require, as links."""
    folder = tmp_path_factory.mktemp("bare")
    for name in requirements("torch", "numpy"):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).is_symlink():  # nvidia is of several
                (folder / top).symlink_to(str(distribution.locate_file(top)))
    for path in site.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


LOOP = """
import sys
from importlib.util import find_spec
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from pretrain import Indexed, InfoBatch

x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
data = list(zip(x, (x.sum(1) > 0).long()))
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), 0.5)
infobatch = InfoBatch(data, epochs=8)
loader = DataLoader(Indexed(data), 32, sampler=infobatch)
for epoch in infobatch.epochs():
    for index, image, label in loader:
        losses = F.cross_entropy(model(image), label, reduction="none")
        optimizer.zero_grad()
        infobatch(losses, index).backward()
        optimizer.step()
accuracy = (model(x).argmax(1) == (x.sum(1) > 0)).float().mean().item()
assert accuracy > 0.9 and infobatch.samples_used < 8 * 400, (accuracy, infobatch.samples_used)
assert not any(find_spec(name) for name in ("tyro", "yaml", "einops", "PIL", "accelerate", "diffusers", "pytest"))
"""


def test_a_loop_and_the_list_of_commands_need_torch_and_numpy_alone(
    bare_site: Path, site: Path, tmp_path: Path
) -> None:
    """And without the other packages the list of commands ends with what installs them."""
    done = run(bare_site, tmp_path, "-S", "-W", "error", "-c", LOOP)
    assert done.returncode == 0, done.stderr
    listed = run(bare_site, tmp_path, "-S", "-m", "pretrain", "--help")
    assert "pip install 'infobatch-pretrain[train]'" in listed.stdout.splitlines()[-1], listed.stderr
    assert "pip install" not in run(site, tmp_path, "-m", "pretrain", "--help").stdout


def test_infobatch_alone_needs_torch_and_numpy(site: Path) -> None:
    """What the wheel requires without its extras; and it says that it has types."""
    (metadata,) = site.glob("*.dist-info/METADATA")
    required = [line.split(": ")[1] for line in metadata.read_text().splitlines() if line.startswith("Requires-Dist")]
    assert sorted(line.partition(">=")[0] for line in required if "extra ==" not in line) == ["numpy", "torch"]
    assert (site / "pretrain" / "py.typed").is_file()


def test_a_command_without_its_packages_names_the_extra(site: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['tyro'] = None; sys.argv[1:] = ['report']; import pretrain.__main__ as m; m.main()"
    done = run(site, tmp_path, "-c", code)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "pretrain report needs tyro, which is not installed; pip install 'infobatch-pretrain[train]'" in done.stderr


def test_the_commands_are_listed_without_torch(site: Path, tmp_path: Path) -> None:
    code = "import sys; import pretrain.__main__ as m; sys.argv[1:] = ['-h']; m.main(); print('torch' in sys.modules)"
    done = run(site, tmp_path, "-c", code)
    assert done.stdout.endswith("False\n") and "encode-latents" in done.stdout, done.stderr
    wrong = run(site, tmp_path, "-m", "pretrain", "trian")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "there is no such command" in wrong.stderr
