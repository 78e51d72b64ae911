"""Folders that are no classes, hold nothing or are linked: all are used, refused or reported, over generated trees."""

import os
import random
from pathlib import Path

import pytest
from PIL import Image

from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.data.files import scan
from pretrain.data.sources import Source, open_data

SETTLED = r"--data\.train-split and --data\.test-split"


def source(path: object, **settings) -> Source:
    return open_data(Data(source=str(path), **settings), seed=0)


def draw(path: Path, count: int = 2) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("L", (4, 4), number).save(path / f"{number}.png")


@pytest.mark.parametrize("seed", range(20))
def test_what_belongs_to_images_is_no_class(tmp_path: Path, seed: int) -> None:
    """Masks beside images, in folders of splits, with splits in them, or without splits."""
    rng = random.Random(seed)
    main = rng.choice(["images", "imgs", "Image", "JPEGImages", "data", "leftImg8bit", "rgb", "labeled"])
    aside = rng.sample(
        ["masks", "Segmentations", "gtFine", "annotations", "depth", "conditioning_images"], rng.randint(1, 2)
    )
    aside = ["unlabeled"] if main == "labeled" else aside
    order = rng.choice(["{0}/{1}", "{1}/{0}", "{1}"])
    for split in ("train", "val"):
        for name in (main, *aside):
            draw(tmp_path / order.format(split, name), 4)
    with pytest.raises(UserError, match=rf"what belongs to them, or classes; name .*{SETTLED}") as refusal:
        source(tmp_path)
    assert main in str(refusal.value) and all(name in str(refusal.value) for name in aside)
    named = {"train_split": order.format("train", main)}
    if order != "{1}":
        named["test_split"] = order.format("val", main)
    s = source(tmp_path, **named)
    assert s.classes == 0 and len(s.train) + len(s.test) == (4 if order == "{1}" else 8)
    if order == "{1}":
        assert source(tmp_path, train_split=".").classes == 1 + len(aside)


def test_classes_named_for_masks_are_classes(tmp_path: Path) -> None:
    for name in ("with_mask", "without_mask", "mask_weared_incorrect"):
        draw(tmp_path / name)
    assert source(tmp_path).classes == 3


@pytest.mark.parametrize("seed", range(6))
def test_folds_are_refused_and_joined(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    pattern = rng.choice(["fold_{}", "Fold{}", "part-{}", "batch {}", "subset{}", "chunk_0{}"])
    classes = rng.choice([["a", "b", "c"], [""]])
    for number in range(3):
        for name in classes:
            draw(tmp_path / pattern.format(number) / name)
    with pytest.raises(UserError, match=rf"may be parts of one data set, or classes; name .*{SETTLED}"):
        source(tmp_path)
    joined = "+".join(pattern.format(number) for number in range(2))
    s = source(tmp_path, train_split=joined, test_split=pattern.format(2))
    assert (len(s.train), len(s.test)) == (4 * len(classes), 2 * len(classes))
    assert s.class_names == (tuple(classes) if len(classes) > 1 else ())
    assert source(tmp_path, train_split=".").classes == 3


def test_folders_of_the_same_names_inside_are_reported(tmp_path: Path) -> None:
    for outer in ("amazon", "dslr", "webcam"):
        for inner in ("bike", "mug"):
            draw(tmp_path / outer / inner)
    s = source(tmp_path)
    assert s.class_names == ("amazon", "dslr", "webcam") and "not bike, mug" in str(s.report)
    assert source(tmp_path, train_split="amazon+dslr", test_split="webcam").class_names == ("bike", "mug")
    (tmp_path / "dslr").rename(tmp_path / "train")  # which is no class: its folders are those of the others
    with pytest.raises(UserError, match=SETTLED):
        source(tmp_path)


def test_a_training_folder_in_a_training_folder_is_refused(tmp_path: Path) -> None:
    for folder in ("train", "train/train", "test"):
        for name in ("a", "b"):
            draw(tmp_path / folder / name)
    with pytest.raises(UserError, match=rf"train in train/ may be a split; name .*{SETTLED}"):
        source(tmp_path)


@pytest.mark.parametrize("held_out", [["test"], ["val", "test"], ["wrapper/val"]])
def test_a_test_folder_is_not_trained_on_in_the_place_of_an_empty_one(tmp_path: Path, held_out: list[str]) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "x.heic").write_bytes(b"x")
    for name in held_out:
        draw(tmp_path / name / "a")
        draw(tmp_path / name / "b")
    with pytest.raises(UserError, match=rf"train holds no images, but .*{SETTLED}"):
        source(tmp_path)


@pytest.mark.parametrize("seed", range(12))
def test_every_folder_is_read_or_reported(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    draw(tmp_path / "z", 3)
    folders = [tmp_path / "z"]
    for number in range(rng.randint(3, 9)):
        kind = rng.choice(["full", "empty", "other", "hidden", "linked"])
        name = f"{kind}{number}"
        folder = rng.choice(folders) / (f"#{name}" if kind == "hidden" else name)
        if kind == "full":
            draw(folder)
            folders.append(folder)
        elif kind == "linked":
            folder.symlink_to(rng.choice(folders))
        else:
            folder.mkdir()
            if kind == "other":
                (folder / "x.heic").write_bytes(b"x")
            elif kind == "hidden":
                draw(folder)
    first, second = scan(tmp_path), scan(tmp_path)
    assert first == second
    s = source(tmp_path)
    assert s.report is not None
    text = " ".join(s.report.notes)
    read = {Path(image["path"]).parent for image in s.train.table["image"]}
    assert {*folders} == read
    for folder in tmp_path.rglob("*"):
        if folder.is_dir() and folder not in read and not any(above.name.startswith("#") for above in folder.parents):
            assert folder.name in text, (folder, text)


def test_of_two_links_to_a_folder_the_first_by_name_is_read(tmp_path: Path) -> None:
    """Not the first on the disk."""
    for name in ("a", "b"):
        draw(tmp_path / "real" / name)
    links = {name: target for target in ("a", "b") for name in (f"{target}{n}" for n in range(9))}
    names = [*links]
    random.Random(0).shuffle(names)
    (tmp_path / "x").mkdir()
    for name in names:
        (tmp_path / "x" / name).symlink_to(tmp_path / "real" / links[name])
    s = source(tmp_path / "x")
    assert s.class_names == ("a0", "b0") and "a1, a2, a3" in str(s.report)


def test_archives_have_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no images in it; passed over: \.zip file 1; archives have to be unpacked"):
        source(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up root's rights for a while")
def test_what_may_not_be_opened_is_named(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        draw(tmp_path / "x" / name)
    (tmp_path / "x" / "c").chmod(0)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o111 != 0o111:
            folder.chmod(0o755)
    try:
        os.seteuid(65534)
        s = source(tmp_path / "x")
        assert s.classes == 2 and "folders without images: c" in str(s.report)
        os.seteuid(0)
        (tmp_path / "x").chmod(0)
        os.seteuid(65534)
        with pytest.raises(UserError, match="no images in it; passed over: folder that can't be opened 1"):
            source(tmp_path / "x")
    finally:
        os.seteuid(0)
