"""`pretrain generate`: single images and a grid."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from conftest import ROOT
from PIL import Image
from programs import common, refused, train

from pretrain.core.errors import UserError
from pretrain.evaluation import generate


@pytest.fixture(scope="module")
def conditional(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with labels whose data set was removed: it is not needed."""
    folder, data = tmp_path_factory.mktemp("conditional") / "run", tmp_path_factory.mktemp("data") / "pictures"
    shutil.copytree(pictures, data)
    train("train_diffusion.py", *common(data, folder, 2), "--adapter", "ddpm", "--class-conditional")
    shutil.rmtree(data)
    return folder


def made(run: Path, output: Path, *words: object) -> dict[str, np.ndarray]:
    """The images that the command generates with these arguments, by file name."""
    tyro.cli(generate.main, args=[*map(str, (run, "-o", output, *words))])
    return images(output)


def images(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted((folder / "images").iterdir())}


WORDS = ("--num-images", 7, "--steps", 3, "--guidance", 2, "--sampler", "dpm++")


def test_an_image_is_a_function_of_its_seed_and_number(conditional: Path, tmp_path: Path, capsys) -> None:
    """Independent of the other images and of the batch size."""
    one = made(conditional, tmp_path / "one", *WORDS, "--batch-size", 2)
    assert "7 images in" in capsys.readouterr().out
    assert [*one] == [f"{n:05d}.png" for n in range(7)]
    assert len({image.tobytes() for image in one.values()}) == 7
    for name, words in (("few", ("--num-images", 3)), ("many", ("--num-images", 9)), ("at once", ("--batch-size", 5))):
        for number, image in made(conditional, tmp_path / name, *WORDS, "--batch-size", 4, *words).items():
            assert number not in one or np.abs(one[number].astype(int) - image).max() <= 1, "rounded otherwise at most"
    again = made(conditional, tmp_path / "again", *WORDS, "--batch-size", 2)
    assert all((one[name] == again[name]).all() for name in one)
    other = made(conditional, tmp_path / "other", *WORDS, "--seed", 1)
    assert all((one[name] != other[name]).any() for name in one)


def test_the_grid_shows_the_images_in_order(conditional: Path, tmp_path: Path) -> None:
    """Nearly square; enlarged, with a line around each."""
    single = made(conditional, tmp_path, "--num-images", 6, "--steps", 2)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    side = sheet.shape[1] // 2
    assert sheet.shape == (3 * side, 2 * side)
    scale = (side - 2) // 12
    for number, image in enumerate(single.values()):
        row, column = divmod(number, 2)
        cell = sheet[row * side + 1 : (row + 1) * side - 1, column * side + 1 : (column + 1) * side - 1]
        assert (cell[::scale, ::scale] == image).all()


def test_labels_cycle_through_the_classes_or_are_one(conditional: Path, tmp_path: Path) -> None:
    both = made(conditional, tmp_path / "both", "--num-images", 4, "--steps", 2)
    for label in (0, 1):
        same = made(conditional, tmp_path / str(label), "--num-images", 4, "--steps", 2, "--label", label)
        assert [(both[name] == same[name]).all() for name in both] == [n % 2 == label for n in range(4)]


def test_guidance_by_levels_and_by_another_run(conditional: Path, finished: Path, tmp_path: Path) -> None:
    """An interval without noise levels is no guidance, nor is a run that guides itself."""
    few = ("--num-images", 3, "--steps", 3)
    plain = made(conditional, tmp_path / "plain", *few)

    def differs(name: str, *words: object) -> bool:
        found = made(conditional, tmp_path / name, *few, "--guidance", 3, *words)
        return any((found[file] != plain[file]).any() for file in plain)

    assert differs("all") and differs("interval", "--guidance-interval", 0.1, 10)
    assert not differs("empty", "--guidance-interval", 1e6, 1e7)
    assert not differs("itself", "--guide", conditional)
    with pytest.raises(UserError, match="it must have the objective, classes and shape of"):
        differs("other", "--guide", finished)


@pytest.mark.slow
def test_processes_share_the_images(conditional: Path, tmp_path: Path) -> None:
    words = [*WORDS, "--batch-size", 2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "pretrain", "generate", conditional, *words, "-o", tmp_path / "two"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = made(conditional, tmp_path / "one", *words), images(tmp_path / "two")
    assert [*one] == [*two] and all((one[name] == two[name]).all() for name in one)
    sheets = [np.asarray(Image.open(tmp_path / name / "grid.png")) for name in ("one", "two")]
    assert (sheets[0] == sheets[1]).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sampler hein", "sampler must be one of ddim, euler, heun, dpm[+][+] for DDPM, got hein"),
        ("--guidance-interval 0.1 10", "--guidance-interval does nothing at --guidance 1"),
        ("--label 2", "the run has classes 0 to 1"),
        ("--label sneaker", "--label sneaker: the run has classes 0 to 1: class 0, class 1"),
        ("--num-images 0", "--num-images must be at least 1, got 0"),
        ("--steps 2000", "--steps 2000"),
        ("--guidance nan", "--guidance must be a finite number, got nan"),
        ("--guidance 2 --guidance-interval 3 1", "--guidance-interval must be two noise levels .*, got 3 1"),
        ("--guidance 2 --guide nowhere", "nowhere: it is not the folder of a run"),
    ],
)
def test_a_mistake_is_one_sentence(words: str, message: str, conditional: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        made(conditional, tmp_path / "images", *words.split())
    assert not (tmp_path / "images").exists()
    with pytest.raises(UserError, match="it exists and is not an empty folder"):
        made(conditional, conditional)
    with pytest.raises(UserError, match="can't be written to: Not a directory"):
        made(conditional, conditional / "config.yaml" / "images")


def test_a_full_disk_is_one_sentence(conditional: Path, tmp_path: Path, monkeypatch) -> None:
    def full(image, path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(
        UserError, match=r"00000\.png: can't be written: .*No space left.*; the images before it are complete"
    ):
        made(conditional, tmp_path / "images", "--num-images", 1, "--steps", 1)


def test_guidance_needs_a_null_class_and_a_mae_makes_no_images(finished: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--guidance 2 needs a model that was trained with and without labels"):
        made(finished, tmp_path / "images", "--guidance", 2)
    for words in ("", "--class-conditional --adapter.label-dropout 0"):
        words = [*common(pictures, tmp_path / "run"), "--evaluate.guidance", 2, *words.split()]
        assert "--evaluate.guidance 2 needs a model that" in refused("train_diffusion.py", *words)
    train("train_mae.py", *common(pictures, tmp_path / "mae", 1))
    with pytest.raises(UserError, match="MAE generates no images; it has no method `scheduler`"):
        made(tmp_path / "mae", tmp_path / "images")
    with pytest.raises(UserError, match="it is not the folder of a run with a checkpoint"):
        made(tmp_path, tmp_path / "images")
