"""Data sets: folders, parquet files and the embedded images; splits, labels, shapes and errors."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import draw_images
from PIL import Image

from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.data.find import EMBEDDED
from pretrain.data.sources import open_data


def source(path: object, **settings):
    return open_data(Data(source=str(path), **settings), seed=0)


def save(folder: Path, name: str, image: Image.Image, **options) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def plain(color: int | tuple = 100, mode: str = "L", size: tuple[int, int] = (6, 6)) -> Image.Image:
    return Image.new(mode, size, color)


def test_the_embedded_images() -> None:
    s = source("fashion-mnist")
    assert (len(s.train), len(s.test), s.shape, s.classes) == (6000, 1000, (1, 28, 28), 10)
    assert [s.train[0, i].label for i in range(3)] == [9, 0, 0]
    folder = EMBEDDED["fashion-mnist"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6
    assert "Permission is hereby granted" in (folder / "LICENSE").read_text()


def test_a_folder_of_class_folders(pictures: Path) -> None:
    s = source(pictures)
    assert (len(s.train), len(s.test), s.shape, s.classes) == (43, 4, (1, 12, 12), 2)
    names = [s.train.table[int(row)]["image"]["path"] for row in s.train.rows]
    assert names == sorted(names)
    assert [s.train[0, i].label for i in range(43)] == [int("class 1" in name) for name in names]
    held_out = {s.test.table[int(row)]["image"]["path"] for row in s.test.rows}
    assert len(held_out) == 4 and not held_out & set(names)


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path, f"{number}.png", plain(number))
    s = source(tmp_path)
    assert s.classes == 0 and s.train[0, 0].label == -1


def test_splits_by_folder(tmp_path: Path) -> None:
    draw_images(tmp_path / "train", 6)
    draw_images(tmp_path / "validation", 4)
    (tmp_path / "validation" / "unheard of").mkdir()
    save(tmp_path / "validation" / "unheard of", "x.png", plain(size=(12, 12)))
    s = source(tmp_path)
    assert (len(s.train), len(s.test), s.classes) == (6, 5, 2)
    assert sorted(s.test[None, i].label for i in range(5)) == [-1, 0, 0, 1, 1]


def test_unusual_file_and_folder_names(tmp_path: Path) -> None:
    """Names with brackets, spaces, non-ASCII and capital letters; nested, linked, hidden and other files."""
    save(tmp_path, "a/[1] x*.PNG", plain())
    save(tmp_path, "a/deep/er/ü 猫.JPeG", plain())
    save(tmp_path, "b/x.bmp", plain())
    save(tmp_path, ".hidden/x.png", plain())
    save(tmp_path, "b/.x.png", plain())
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "b" / "folder.png").mkdir()
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    s = source(tmp_path)
    found = {Path(s.train.table[row]["image"]["path"]).name for row in range(len(s.train.table))}
    assert found == {"[1] x*.PNG", "ü 猫.JPeG", "x.bmp"}


@pytest.mark.parametrize("folder", [False, True])
def test_parquet_files(tmp_path: Path, folder: bool) -> None:
    rows = {"pic": [plain(n) for n in range(20)], "label": [n % 3 for n in range(20)]}
    features = datasets.Features({"pic": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    if folder:
        table.select(range(5)).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    s = source(tmp_path if folder else tmp_path / "train-00000-of-00001.parquet")
    assert (len(s.train), len(s.test)) == ((20, 5) if folder else (18, 2))
    assert s.classes == 3 and s.shape == (1, 6, 6)
    value = [s.train[0, i].image.float().mean().item() for i in range(len(s.train))]
    assert value == [float(row) for row in s.train.rows]


@pytest.mark.parametrize(
    ("labels", "classes", "first"),
    [
        (["b", "a", None, "b"], 2, [1, 0, -1, 1]),
        ([True, False, True, True], 2, [1, 0, 1, 1]),
        ([10**12, 5, 5, 7], 3, [2, 0, 0, 1]),
        ([3, None, -1, 3], 0, [-1, -1, -1, -1]),  # one class is none
        ([None, None, None, None], 0, [-1, -1, -1, -1]),
    ],
)
def test_labels_of_any_kind_become_numbers(tmp_path: Path, labels: list, classes: int, first: list[int]) -> None:
    rows = {"image": [plain(n) for n in range(4)], "label": labels}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "train.parquet")
    table.select([0]).to_parquet(tmp_path / "test.parquet")
    s = source(tmp_path)
    assert s.classes == classes
    assert [s.train[0, i].label for i in range(4)] == first
    assert s.test[0, 0].label == first[0]


def test_colour_and_the_common_size_are_found_wherever_they_are(tmp_path: Path) -> None:
    save(tmp_path, "a/000.png", plain(size=(9, 9)))
    for number in range(1, 100):
        save(tmp_path, f"a/{number:03d}.png", plain())
    for number in range(60):
        save(tmp_path, f"b/{number:03d}.png", plain((1, 2, 3), "RGB"))
    assert source(tmp_path).shape == (3, 6, 6)


def test_parquet_paths_with_brackets(tmp_path: Path) -> None:
    rows = {"image": [plain(n) for n in range(4)]}
    path = tmp_path / "[x] *" / "train.parquet"
    path.parent.mkdir()
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(path)
    assert len(source(path).train) == len(source(path.parent).train) == 3


def test_a_data_set_is_split_the_same_way_every_time(pictures: Path) -> None:
    assert np.array_equal(source(pictures).train.rows, source(pictures).train.rows)


def test_grey_and_colour_together_are_colour(tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path, f"{number}.png", plain())
    assert source(tmp_path).shape == (1, 6, 6)
    save(tmp_path, "9.png", plain((1, 2, 3), "RGB"))
    assert source(tmp_path).shape == (3, 6, 6)
    assert source(tmp_path, channels=1).shape == (1, 6, 6)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["./not/there", "/not/there", "~/not/there", "a/b/c"])
def test_a_missing_path_raises(path: str) -> None:
    with pytest.raises(UserError, match="there is no such file or folder"):
        source(path)


def test_empty_folders_and_other_files(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match="there are no images in it"):
            source(tmp_path)
        (tmp_path / "words.txt").write_text("x")
    with pytest.raises(UserError, match="must be a parquet file or a tar file"):
        source(tmp_path / "words.txt")
    (tmp_path / "x.parquet").write_text("x")
    with pytest.raises(UserError, match=r"x\.parquet can.t be read"):
        source(tmp_path / "x.parquet")
    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="its columns are text"):
        source(tmp_path / "x.parquet")


def test_one_image_is_not_enough(tmp_path: Path) -> None:
    save(tmp_path, "x.png", plain())
    with pytest.raises(UserError, match="one image is not enough"):
        source(tmp_path)


def test_sizes_that_differ(tmp_path: Path) -> None:
    for number, size in enumerate([(6, 6), (6, 6), (8, 6), (6, 6)]):
        save(tmp_path, f"{number}.png", plain(size=size))
    s = source(tmp_path)
    problems = [image.problem for i in range(len(s.train)) if (image := s.train[0, i]).problem]
    problems += [image.problem for i in range(len(s.test)) if (image := s.test[0, i]).problem]
    assert len(problems) == 1 and "it is 8x6 where most images are 6x6; resize all with --data.size N" in problems[0]
    s = source(tmp_path, size=4)
    assert s.shape == (1, 4, 4) and not any(s.train[0, i].problem for i in range(len(s.train)))
