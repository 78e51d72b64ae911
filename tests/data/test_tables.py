"""Tables: splits, columns of images and labels, metadata beside images."""

import csv
import json
import os
import random
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import torch
from parquet_files import pictures, table
from PIL import Image
from pyarrow import parquet

from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.data.fingerprint import fingerprint
from pretrain.data.sources import Source, open_data


def source(path: object, **settings) -> Source:
    return open_data(Data(source=str(path), **settings), seed=0)


def draw(path: Path, count: int = 2, value: int = 9) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("L", (4, 4), value + number).save(path / f"{number}.png")


def tally(s: Source) -> tuple[int, int]:
    """Images to train and to evaluate on."""
    return len(s.train), len(s.test)


def used(s: Source, part: str = "train") -> dict[str, int]:
    """Images by class."""
    images = getattr(s, part)
    names = [*s.class_names, ""]
    labels = [images[None, number].label for number in range(len(images))]
    return {name: labels.count(number) for number, name in zip([*range(len(names) - 1), -1], names, strict=True)}


def test_parquet_among_images(tmp_path: Path) -> None:
    draw(tmp_path / "a", 3)
    draw(tmp_path / "b", 3)
    table({"image": pictures(3)}, tmp_path / "a" / "deep.parquet", image=datasets.Image())
    table({"text": ["x"]}, tmp_path / "words.parquet")
    s = source(tmp_path)
    assert sum(tally(s)) == 6 and s.report.passed_over[".parquet file"] == 2
    table({"image": pictures(3)}, tmp_path / "train.parquet", image=datasets.Image())
    with pytest.raises(UserError, match=r"6 image files and the parquet file .*train\.parquet; name the one"):
        source(tmp_path)


@pytest.mark.parametrize(
    "names", [("cats", "dogs", "steam_train"), ("a", "test_results"), ("train-0", "train-1"), ("x",)]
)
def test_parquet_files_are_splits_all_or_none(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        table({"image": pictures(10)}, tmp_path / f"{name}.parquet", image=datasets.Image())
    assert sum(tally(source(tmp_path))) == 10 * len(names)


def test_parquet_splits_of_any_spelling(tmp_path: Path) -> None:
    for name in ("Training_00", "Training_01", "dev"):
        table({"image": pictures(10)}, tmp_path / "data" / f"{name}.parquet", image=datasets.Image())
    assert tally(source(tmp_path)) == (20, 10)
    assert sum(tally(source(tmp_path, train_split="Training_00", test_split="none"))) == 10
    table({"image": pictures(10)}, tmp_path / "data" / "other.parquet", image=datasets.Image())
    with pytest.raises(UserError, match=r"--data\.train-split"):
        source(tmp_path)
    assert tally(source(tmp_path, train_split="Training_00+Training_01+other", test_split="dev")) == (30, 10)


def test_columns_of_images_and_labels(tmp_path: Path) -> None:
    file, kind = tmp_path / "x.parquet", datasets.Image()
    rows = {
        "mask": pictures(4),
        "image": pictures(4),
        "label": [1.0, float("nan"), 2.0, 1.0],
        "class": ["x", "y", "", "x"],
    }
    table(rows, file, mask=kind, image=kind)
    s = source(file)
    assert s.class_names == ("1", "2") and s.report.images == "column image" and "not from class" in str(s.report)
    assert source(file, image="mask", label="class").class_names == ("x", "y")
    table({"left": pictures(4), "right": pictures(4)}, file, left=kind, right=kind)
    with pytest.raises(UserError, match=r"left, right; name one with --data\.image"):
        source(file)
    assert sum(tally(source(file, image="right"))) == 4
    for setting in ("image", "label"):
        with pytest.raises(UserError, match=rf"--data\.{setting} nonsense.*columns are left, right"):
            source(file, image="nonsense" if setting == "image" else "left", label="nonsense")


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_metadata_beside_images(tmp_path: Path, ending: str) -> None:
    draw(tmp_path / "images", 6)
    rows = [{"file_name": f"images/{n}.png", "label": "ab"[n % 2], "kind": "c"} for n in range(5)]
    file = tmp_path / f"metadata.{ending}"
    if ending == "csv":
        file.write_text("file_name,label,kind\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    elif ending == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(file)
    s = source(tmp_path)
    train, test = used(s), used(s, "test")
    assert {name: train[name] + test[name] for name in train} == {"a": 3, "b": 2, "": 1}
    assert "does not list 1 images" in str(s.report)
    with pytest.raises(UserError, match=r"--data\.label nonsense"):
        source(tmp_path, label="nonsense")


def write_metadata(folder: Path, rows: list[dict], ending: str) -> None:
    file = folder / f"metadata.{ending}"
    if ending == "csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize("values", [["b", "a", "c d"], [1, 2, 3], [0.5, 1, 2.25], [3.0, 1.0, 2.0], ["", "x", "y"]])
def test_metadata_means_the_same_in_any_format(tmp_path: Path, ending: str, values: list) -> None:
    """Fractions are no classes, columns that are not used are reported, an image has one label."""
    draw(tmp_path, 6)
    rows = [{"file_name": f"{n}.png", "label": values[n % 3], "split": "train" if n else "test"} for n in range(6)]
    write_metadata(tmp_path, rows, ending)
    s = source(tmp_path)
    assert s.classes == (0 if 0.5 in values else 2 if "" in values else 3)
    assert "columns of metadata" in str(s.report) and "(test 1, train 5)" in str(s.report)
    assert ("are fractions" in str(s.report)) == (0.5 in values)
    write_metadata(tmp_path, [*rows, rows[0]], ending)
    assert source(tmp_path).classes == s.classes
    write_metadata(tmp_path, [*rows, rows[0] | {"label": values[1]}], ending)
    with pytest.raises(UserError, match=r"the labels of 0\.png are .* and .*; correct it"):
        source(tmp_path)


def test_metadata_that_names_no_classes(tmp_path: Path) -> None:
    draw(tmp_path, 4)
    write_metadata(tmp_path, [{"file_name": f"{n}.png", "label": [n]} for n in range(4)], "jsonl")
    assert "4 values of label of metadata.jsonl are no classes" in str(source(tmp_path).report)
    (tmp_path / "metadata.jsonl").write_text("")
    assert "metadata.jsonl is not used: it has no rows" in str(source(tmp_path).report)
    (tmp_path / "metadata.csv").write_text("file_name,label,label\n0.png,a,b\n")
    with pytest.raises(UserError, match="several columns label"):
        source(tmp_path)


@pytest.mark.parametrize("bad", ["stop", "skip"])
def test_rows_without_an_image_are_named(tmp_path: Path, bad: str) -> None:
    rows = [*pictures(5), None, {"bytes": b"", "path": None}, {"bytes": None, "path": None}]
    table({"image": rows, "label": [0, 1] * 4}, tmp_path / "x.parquet", image=datasets.Image())
    s = source(tmp_path, on_bad_image=bad, test_split="none")
    found = [images[None, n] for images in (s.train, s.test) for n in range(len(images))]
    problems = [item.problem for item in found if item.problem]
    assert len(problems) >= 3 - (len(found) - 8) and all("row " in problem for problem in problems)
    from pretrain.data.fingerprint import fingerprints

    assert {len(marks) for marks in fingerprints(s).values()} == {len(s.train), len(s.test)}


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_table_reads_no_file_outside_of_its_folder(tmp_path: Path, kind: str) -> None:
    draw(tmp_path / "secret", 1)
    draw(tmp_path / "data" / "images", 2)
    (tmp_path / "data" / "images" / "link.png").symlink_to(tmp_path / "secret" / "0.png")
    inside = ["images/0.png", "images/1.png", str(tmp_path / "data" / "images" / "0.png")]
    outside = ["../secret/0.png", str(tmp_path / "secret" / "0.png"), "images/link.png"]
    rows = [{"bytes": None, "path": path} for path in inside + outside]
    made = pa.table({"image": rows})
    if kind == "parquet":
        parquet.write_table(made, tmp_path / "data" / "x.parquet")
        s = source(tmp_path / "data" / "x.parquet", size=4)
    else:
        datasets.Dataset(made).save_to_disk(tmp_path / "saved")
        for file in (tmp_path / "saved").iterdir():
            file.rename(tmp_path / "data" / file.name)
        s = source(tmp_path / "data", size=4)
        assert s.report.passed_over == {"image or .parquet file beside the saved data set": 3}
    found = [images[None, n] for images in (s.train, s.test) for n in range(len(images))]
    problems = [item.problem for item in found if item.problem]
    assert len(problems) == 3 and all("leads out of the folder" in problem for problem in problems)


# -- folders that `save_to_disk` of the datasets library wrote -------------------------------------------------


def rows(rng: random.Random, count: int, image: str, label: str) -> datasets.Dataset:
    """A table with class names; one row in ten has no label."""
    values = [-1 if rng.random() < 0.1 else rng.randrange(3) for _ in range(count)]
    made = datasets.Dataset.from_dict({"text": ["x"] * count, image: pictures(count), label: values})
    made = made.cast_column(image, datasets.Image())
    return made.cast_column(label, datasets.ClassLabel(names=["cat", "dog", "owl"]))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("seed", range(12))
def test_a_saved_data_set_is_what_its_parquet_files_are(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    columns = rng.choice(["image", "img", "scan"]), rng.choice(["label", "fine", "Category"])
    splits = rng.choice([["all"], ["train", "test"], ["Training", "dev"], ["train", "validation", "test", "extra"]])
    tables = {name: rows(rng, rng.randint(10, 14), *columns) for name in splits}
    where = tmp_path / "saved" / rng.choice(["", "wrapper", "a/b"])
    if rng.random() < 0.5:
        tables = {name: table.with_format("torch", columns=["text"]) for name, table in tables.items()}
    if len(tables) == 1:
        tables["all"].save_to_disk(where)
    elif rng.random() < 0.3:  # a Dataset in each folder
        for name, table in tables.items():
            table.save_to_disk(where / name)
    else:
        datasets.DatasetDict(tables).save_to_disk(where)
    for name, made in tables.items():
        if name != "extra":  # among files, beside names of splits, it would be refused
            made.with_format(None).to_parquet(tmp_path / "files" / f"{name}.parquet")
    before = contents(tmp_path / "saved")
    s, files = source(tmp_path / "saved"), source(tmp_path / "files")
    assert tally(s) == tally(files) and used(s) == used(files) and used(s, "test") == used(files, "test")
    assert s.class_names == ("cat", "dog", "owl")
    one, other = s.report.to_dict(), files.report.to_dict()
    assert all(one[name] == other[name] for name in ("classes", "labels", "images", "shape", "range"))
    for split in ("train", "test"):
        counts = one["splits"][split], other["splits"][split]
        assert all(counts[0][name] == counts[1][name] for name in ("used", "images")), counts
    assert not s.report.passed_over and ("extra (" in str(s.report)) == ("extra" in tables)
    for part in ("train", "test"):
        assert torch.equal(fingerprint(getattr(s, part)), fingerprint(getattr(files, part)))
    assert contents(tmp_path / "saved") == before


def test_splits_of_a_saved_data_set_are_named(tmp_path: Path) -> None:
    rng = random.Random(0)
    made = datasets.DatasetDict({name: rows(rng, 10, "image", "label") for name in ("a", "b", "c")})
    made.save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"which of its splits is to be trained on is unclear: a, b, c"):
        source(tmp_path / "saved")
    assert tally(source(tmp_path / "saved", train_split="a+b", test_split="c")) == (20, 10)
    assert tally(source(tmp_path / "saved", train_split=".", test_split="c")) == (20, 10)
    assert tally(source(tmp_path / "saved", train_split=".")) == (27, 3)
    assert tally(source(tmp_path / "saved", train_split="b", test_split="none")) == (9, 1)
    for settings in ({"train_split": "a+x"}, {"train_split": "a", "test_split": "d"}):
        with pytest.raises(UserError, match=r"the splits of .*saved are a, b, c"):
            source(tmp_path / "saved", **settings)
    with pytest.raises(UserError, match="it would be trained on, too"):
        source(tmp_path / "saved", train_split="a+b", test_split="b")


def test_a_saved_data_set_that_can_not_be_opened_is_one_sentence(tmp_path: Path) -> None:
    rng = random.Random(0)
    made = datasets.DatasetDict({name: rows(rng, 10, "image", "label") for name in ("train", "test")})

    def refused(**settings) -> str:
        with pytest.raises(UserError) as refusal:
            source(tmp_path / "saved", **settings)
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    for number in range(2):
        made.save_to_disk(tmp_path / "saved" / f"{number}")
    assert "several saved data sets: 0, 1; name one" in refused()
    shutil.rmtree(tmp_path / "saved" / "1")
    draw(tmp_path / "saved" / "cats", 3)
    assert "it holds 3 image files and the saved data set" in refused()
    shutil.rmtree(tmp_path / "saved" / "cats")
    assert "no such column; its columns are text, image, label" in refused(label="x")
    (file,) = (tmp_path / "saved" / "0" / "train").glob("*.arrow")
    good = file.read_bytes()
    state = file.with_name("state.json")
    for name in ("../test/" + file.name, str(file), "..", 7):
        kept = state.read_text()
        state.write_text(json.dumps(json.loads(kept) | {"_data_files": [{"filename": name}]}))
        assert "reading it failed with" in refused()
        state.write_text(kept)
    for content in (b"", good[: len(good) // 2], b"x" * 100):
        file.write_bytes(content)
        assert "reading it failed with" in refused()
    file.unlink()
    os.mkfifo(file)
    assert "is not a regular file of the data set" in refused()
