"""Folders: which splits, classes and images they hold, over generated layouts; and the report of it."""

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from parquet_files import pictures, table
from PIL import Image

from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.data.decode import decode
from pretrain.data.files import SUFFIXES, scan
from pretrain.data.sources import Source, open_data
from pretrain.data.splits import KINDS, split_of

SEEDS = range(6)
NAMES = (
    "cats",
    "dogs",
    "Owl",
    "n01440764",
    "red_panda",
    "Testudo",
    "valley",
    "trainer",
    "evalina",
)


def source(path: object, **settings) -> Source:
    return open_data(Data(source=str(path), **settings), seed=0)


def draw(path: Path, count: int = 2, value: int = 9) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("L", (4, 4), value + number).save(path / f"{number}.png")


def split_name(rng: random.Random, kind: str) -> str:
    """A folder name that means a split."""
    word = rng.choice(KINDS[kind])
    word = rng.choice([str.lower, str.upper, str.title])(word)
    return rng.choice(["{}", "{}2017", "seg_{}", "{}-set", "0_{}", "Data{}" if word.istitle() else "{}"]).format(word)


def tally(s: Source) -> tuple[int, int]:
    """Images to train and to evaluate on."""
    return len(s.train), len(s.test)


def used(s: Source, part: str = "train") -> dict[str, int]:
    """Images by class."""
    images = getattr(s, part)
    names = [*s.class_names, ""]
    labels = [images[None, number].label for number in range(len(images))]
    return {name: labels.count(number) for number, name in zip([*range(len(names) - 1), -1], names, strict=True)}


# -- layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_folders_that_are_all_split_names_are_splits(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    train, held = split_name(rng, "train"), split_name(rng, rng.choice(["validation", "test"]))
    assert split_of(train) == "train" and split_of(held) in ("validation", "test")
    root = tmp_path / rng.choice(["", "wrapper", "wrapper/dataset"])
    inner = rng.choice(["", "images"])
    for number, name in enumerate(NAMES[:3]):
        draw(root / train / inner / name, number + 2)
        respelled = rng.choice([str, str.upper, str.lower, lambda text: f"{text} "])(name)
        draw(root / held / inner / respelled, number + 1)
    s = source(tmp_path)
    assert tally(s) == (9, 6) and s.class_names == tuple(sorted(NAMES[:3]))
    assert used(s) == {name: number + 2 for number, name in enumerate(NAMES[:3])} | {"": 0}
    assert used(s, "test") == {name: number + 1 for number, name in enumerate(NAMES[:3])} | {"": 0}
    assert s.report.classes == used(s)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_split_name_among_classes_is_a_class_and_is_reported(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    classes = [*rng.sample(NAMES, 3), rng.choice(["train", "Test", "val", "steam_train"])]
    for name in classes:
        draw(tmp_path / name, 4)
    s = source(tmp_path, test_split=rng.choice(["none", None]))
    assert sum(tally(s)) == 16 and sorted(classes) == list(s.class_names)
    assert f"{classes[-1]} is taken for a class" in str(s.report)
    s = source(tmp_path, train_split=".", test_split=classes[-1])
    assert tally(s) == (12, 4) and s.classes == 3


def images_beside(root: Path) -> None:
    draw(root, 4)
    draw(root / "train")


def two_kinds(root: Path) -> None:
    for name in ("train", "val", "cats"):
        draw(root / name)


def another_structure(root: Path) -> None:
    draw(root / "train" / "cats")
    draw(root / "train" / "dogs")
    draw(root / "more")


def generic(root: Path) -> None:
    draw(root / "test")
    draw(root / "images")


def two_trains(root: Path) -> None:
    for name in ("train_clean", "train_noisy", "test"):
        draw(root / name)


def no_train(root: Path) -> None:
    draw(root / "val")
    draw(root / "test")


def deeper(root: Path) -> None:
    for name in ("train", "test"):
        draw(root / "a" / "x" / name)
    draw(root / "b")


@pytest.mark.parametrize(
    "layout",
    [images_beside, two_kinds, another_structure, generic, two_trains, no_train, deeper],
    ids=lambda f: f.__name__,
)
def test_what_is_ambiguous_is_refused_and_settled(tmp_path: Path, layout: Callable[[Path], None]) -> None:
    layout(tmp_path)
    with pytest.raises(UserError, match=r"--data\.train-split and --data\.test-split") as refusal:
        source(tmp_path)
    assert "\n" not in str(refusal.value)
    everything = scan(tmp_path).images.total
    assert sum(tally(source(tmp_path, train_split="."))) == everything
    first = next(path.name for path in sorted(tmp_path.iterdir()) if path.is_dir())
    s = source(tmp_path, train_split=".", test_split=first)
    inside = scan(tmp_path / first).images.total
    assert tally(s) == (everything - inside, inside)
    s = source(tmp_path, train_split=first, test_split="none")
    assert sum(tally(s)) == inside
    with pytest.raises(UserError, match="there are no images of that name"):
        source(tmp_path, train_split="nonsense")


def in_some_classes(rng: random.Random, root: Path) -> None:
    """Classes, of which some hold a folder of a split's name, with or without images beside it."""
    classes = rng.sample(NAMES, rng.randint(2, 4))
    kinds = rng.sample(["train", "validation", "test"], rng.choice([1, 1, 2]))
    for name in classes:
        inner = root / rng.choice(["", "", "train"]) / name / rng.choice(["", "", "more"])
        if rng.random() < 0.5:
            for kind in rng.sample(kinds, rng.randint(1, len(kinds))):
                draw(inner / split_name(rng, kind) / rng.choice(["", "x"]), rng.randint(1, 2))
        if not inner.is_dir() or rng.random() < 0.4:
            draw(inner / rng.choice(["", "", "y"]), 3)
    if rng.random() < 0.4:
        draw(root / "test" / classes[0])
    draw(root / classes[0], 1)


@pytest.mark.parametrize("seed", range(60))
def test_no_held_out_image_is_trained_on_in_silence(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    in_some_classes(rng, tmp_path)
    try:
        s = source(tmp_path, test_split=rng.choice(["none", None, None]))
    except UserError as refusal:
        assert re.search(r"--data\.train-split and --data\.test-split", str(refusal)) and "\n" not in str(refusal)
        assert sum(tally(source(tmp_path, train_split="."))) == scan(tmp_path).images.total
        return
    for row in s.train.rows.tolist():
        path = Path(s.train.table[row]["image"]["path"]).relative_to(tmp_path)
        for name in path.parts[:-1]:
            if split_of(name) in ("validation", "test", "unclear"):
                assert name in str(s.report), path


@pytest.mark.parametrize("beside", [True, False])
def test_a_split_in_some_classes_is_refused(tmp_path: Path, beside: bool) -> None:
    draw(tmp_path / "cats", 3)
    draw(tmp_path / "dogs" / "val", 2)
    if beside:
        draw(tmp_path / "dogs", 3)
    with pytest.raises(UserError, match=r"val in dogs/ may be a split; name the folders with --data\.train-split"):
        source(tmp_path)
    s = source(tmp_path, test_split="dogs/val")
    assert tally(s) == (3 + 3 * beside, 2)
    draw(tmp_path / "dogs" / "poodle", 2)  # beside which val is a name like any other
    if not beside:
        assert "val in dogs/ is taken for no split" in str(source(tmp_path).report)


def test_splits_inside_of_classes(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        draw(tmp_path / name / "train", 3)
        draw(tmp_path / name / "test", 2)
    s = source(tmp_path)
    assert tally(s) == (6, 4) and used(s) == {"cats": 3, "dogs": 3, "": 0} == used(s) and used(s, "test")["cats"] == 2


def test_a_labelled_split_is_preferred_and_the_rest_is_reported(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 3)):
        for name in ("a", "b"):
            draw(tmp_path / split / name, count)
    draw(tmp_path / "test", 5)
    s = source(tmp_path)
    assert tally(s) == (8, 6) and "test (5 images) is not used" in str(s.report)
    s = source(tmp_path, test_split="test")
    assert tally(s) == (8, 5) and "test has no labels" in str(s.report) and used(s, "test") == {"a": 0, "b": 0, "": 5}


def test_classes_that_training_does_not_have_are_counted(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw(tmp_path / "train" / name)
    for name in ("A", "zebra"):
        draw(tmp_path / "test" / name, 3)
    s = source(tmp_path)
    assert used(s, "test") == {"a": 3, "b": 0, "": 3}
    assert "zebra 3" in str(s.report) and "A as a" in str(s.report)


def test_one_class_is_no_class(tmp_path: Path) -> None:
    draw(tmp_path / "wrapper" / "dogs", 5)
    s = source(tmp_path)
    assert s.classes == 0 and "all images lie in wrapper/dogs/" in str(s.report)


# -- what is no image ------------------------------------------------------------------------------


def test_every_extension_of_the_formats_is_an_image_and_the_rest_is_counted(tmp_path: Path) -> None:
    suffixes = sorted(SUFFIXES)
    assert {".jfif", ".jpe", ".jp2", ".pgm", ".avif", ".tif"} <= SUFFIXES and ".eps" not in SUFFIXES
    draw(tmp_path / "a", 1)
    content = (tmp_path / "a" / "0.png").read_bytes()
    for suffix in suffixes:
        (tmp_path / "a" / f"x{suffix.upper()}").write_bytes(content)
    for hidden in ("@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", ".thumbs", "~snapshot"):
        draw(tmp_path / hidden)
    for name in ("notes.txt", "more.txt", "scan.heic", ".DS_Store", "._0.png"):
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path)
    s = source(tmp_path)
    assert sum(tally(s)) == len(suffixes) + 1
    assert s.report.passed_over == {
        "hidden folder": 6,
        ".txt file": 2,
        ".heic file": 1,
        "hidden file": 2,
        "file that is no regular file": 1,
        "broken link": 1,
        "link to a folder that is read anyway": 1,
    }
    assert all(images[None, n].problem == "" for images in (s.train, s.test) for n in range(len(images)))


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.4", b"<svg/>"])
def test_formats_that_are_not_read_are_bad_images(tmp_path: Path, content: bytes) -> None:
    draw(tmp_path, 4)
    (tmp_path / "0.png").write_bytes(content)
    with pytest.raises(ValueError, match="no image of these formats"):
        decode({"bytes": None, "path": str(tmp_path / "0.png")}, 1, None)


def test_names_of_any_bytes(tmp_path: Path) -> None:
    """They are read, and printed without control characters."""
    draw(tmp_path, 3)
    good = (tmp_path / "0.png").read_bytes()
    for name in (b"caf\xe9.png", b"\x1b[31mred\n.png"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(good[:40])
    s = source(tmp_path, on_bad_image="skip")
    problems = [
        item.problem for images in (s.train, s.test) for n in range(len(images)) if (item := images[None, n]).problem
    ]
    assert len(problems) == 2 and all(problem.isprintable() and problem.isascii() for problem in problems)
    assert any(r"caf\udce9.png" in problem for problem in problems)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(good)
    assert sum(not images[None, n].problem for images in (s.train, s.test) for n in range(len(images))) == 4
    draw(tmp_path / "\x1b]0;x\x07", 3)
    draw(tmp_path / "b", 3)
    assert str(source(tmp_path).report).replace("\n", "").isprintable()


def test_splits_of_the_hub(monkeypatch) -> None:
    def load(name: str) -> dict:
        made = datasets.Dataset.from_dict({"img": pictures(12), "fine": [0, 1] * 6, "coarse": [0] * 12})
        made = made.cast_column("img", datasets.Image())
        for label, names in (("fine", ["x", "y"]), ("coarse", ["z"])):
            made = made.cast_column(label, datasets.ClassLabel(names=names))
        blind = made.map(lambda row: {**row, "fine": -1})
        return {split: blind if split == "test" else made for split in splits}

    monkeypatch.setattr("datasets.load_dataset", load)
    splits = ["unsupervised", "test", "train", "validation_matched"]
    s = source("some/name")
    assert tally(s) == (12, 12) and s.test.name == "some/name, validation_matched" and s.class_names == ("x", "y")
    for what in ("not from coarse", "unsupervised (12 rows)", "test (12 images) is not used"):
        assert what in str(s.report)
    assert source("some/name", train_split="unsupervised", test_split="none", label="coarse").classes == 0
    splits = ["train_clean", "train_other"]
    with pytest.raises(UserError, match=r"train_clean, train_other; name it with --data\.train-split"):
        source("some/name")
    assert tally(source("some/name", train_split="train_other")) == (11, 1)
    with pytest.raises(UserError, match="the splits of some/name are train_clean, train_other"):
        source("some/name", train_split="nonsense")


def test_names_that_climb_are_no_names_on_the_hub(tmp_path: Path, monkeypatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("it was loaded")

    deep = tmp_path / "a" / "b" / "c"  # so that a name which climbs leads to no files
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    monkeypatch.setenv("HOME", str(deep))
    monkeypatch.setattr("datasets.load_dataset", load)
    rng = random.Random(0)
    for _ in range(5):
        parts = [
            rng.choice(["..", ".", "a..", "..b", "a--b", "a\0b", "a/b", "~", "a b", ""]),
            rng.choice(["a", "..", ""]),
        ]
        name = "/".join(rng.sample(parts, 2))
        with pytest.raises(UserError) as refusal:
            source(name or "..x")
        assert "\n" not in str(refusal.value) and "it was loaded" not in str(refusal.value), name


def test_columns_that_are_no_images(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    table({"image": [1, 2, 3], "png": [picture["bytes"] for picture in pictures(3)]}, file)
    assert source(file).report.images == "column png"
    with pytest.raises(UserError, match=r"column image can't be read as images .*--data\.image"):
        source(file, image="image")
    table({"image": [[[1, 2], [3, 4]], None, [[1, 2], [3]], [[9, 9], [9, 255]]]}, file)
    s = source(file)
    found = {int(images.rows[n]): images[None, n].problem for images in (s.train, s.test) for n in range(len(images))}
    assert not found[0] and not found[3] and all("row " in found[row] for row in (1, 2))
    draw(tmp_path / "files", 3)
    table({"image": [f"files/{n}.png" for n in range(3)] + ["/etc/passwd"]}, file)
    s = source(file)
    found = {int(images.rows[n]): images[None, n].problem for images in (s.train, s.test) for n in range(len(images))}
    assert [bool(found[row]) for row in range(4)] == [False, False, False, True] and "leads out" in found[3]


# -- the report ------------------------------------------------------------------------------------


def test_the_report_of_what_is_plain_is_short(tmp_path: Path) -> None:
    s = source("fashion-mnist")
    assert len(str(s.report).splitlines()) <= 4 and s.class_names[9] == "Ankle boot"
    for name in range(14):
        draw(tmp_path / f"{name:02d}")
    text = str(source(tmp_path).report)
    assert "09" in text and "and 4 more" in text and "12 2" not in text and len(text.splitlines()) <= 4
    stored = json.loads(json.dumps(s.report.to_dict()))
    assert stored["classes"]["Sneaker"] == 600 and stored["splits"]["test"]["used"] == 1000


def test_a_run_prints_and_stores_what_was_taken(finished: Path) -> None:
    stored = json.loads((finished / "data.json").read_text())
    assert stored["class_names"] == ["class 0", "class 1"] and sum(stored["classes"].values()) == 43
    assert json.loads((finished / "summary.json").read_text())["class_names"] == stored["class_names"]
