"""`python -m pretrain.generate`: images of a run, one by one and on one sheet."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from programs import common, train


@pytest.fixture(scope="module")
def conditional(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conditional") / "run"
    train("train_diffusion.py", *common(pictures, folder, 2), "--adapter", "ddpm", "--conditional")
    return folder


def generate(run: Path, *words: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "pretrain.generate", run, *words]
    return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=150)


def images(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))}


def test_an_image_is_a_function_of_its_seed_and_number_on_any_number_of_processes(
    conditional: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(conditional, run)  # the data set is asked for nothing
    words = ["--images", 7, "--steps", 3, "--batch-size", 2, "--guidance", 2, "--sampler", "dpm++"]
    one = generate(run, *words)
    assert one.returncode == 0 and "7 images in" in one.stdout, one.stderr
    two = generate(run, *words, "-o", tmp_path / "two", processes=2)
    assert two.returncode == 0, two.stderr
    first, second = images(run / "generated"), images(tmp_path / "two")
    assert [*first] == [*second] == [f"{n:05d}.png" for n in range(7)]
    assert all((first[name] == second[name]).all() for name in first)
    assert len({image.tobytes() for image in first.values()}) == 7
    sheet = [np.asarray(Image.open(folder / "grid.png")) for folder in (run / "generated", tmp_path / "two")]
    assert (sheet[0] == sheet[1]).all() and sheet[0].std() > 0
    assert generate(run, *words, "--seed", 1, "-o", tmp_path / "other").returncode == 0
    assert all((first[name] != image).any() for name, image in images(tmp_path / "other").items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--sampler hein", "sampler must be one of ddim, euler, heun, dpm++ for DDPM, got hein"),
        ("--label 2", "the run has classes 0 to 1"),
        ("--n 0", "--n must be at least 1, got 0"),
        ("--steps 2000", "--steps 2000"),
        ("--output-dir {run}", "it is there already and not an empty folder"),
    ],
)
def test_a_mistake_is_one_sentence(words: str, said: str, conditional: Path) -> None:
    done = generate(conditional, *words.format(run=conditional).split())
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (conditional / "generated").exists()


def test_guidance_needs_a_null_class_and_a_mae_makes_no_images(finished: Path, pictures: Path, tmp_path: Path) -> None:
    assert "--guidance 2 needs a model that knows images" in generate(finished, "--guidance", 2).stderr
    train("train_mae.py", *common(pictures, tmp_path / "mae", 1))
    assert "MAE makes no images" in generate(tmp_path / "mae").stderr
    assert "there is no run with a checkpoint there" in generate(tmp_path).stderr
