"""Several parquet files as one table: what is damaged, differs or is missing is named, over generated files."""

import random
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from parquet_files import pictures, table
from pyarrow import parquet

from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.data.sources import Source, open_data


def source(path: object, **settings) -> Source:
    return open_data(Data(source=str(path), **settings), seed=0)


def shard(path: Path, rows: int = 4, names: tuple[str, ...] = ("x", "y"), **more: list) -> None:
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    table({"image": pictures(rows), "label": [0, 1] * (rows // 2), **more}, path, **features)


REFUSED = {  # what is wrong with one of several files, and what is said of it
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "can't be read"),
    "empty": (lambda path: path.write_bytes(b""), "can't be read: it is empty"),
    "pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid x\n"), "git lfs pull"),
    "twice": (
        lambda path: parquet.write_table(pa.Table.from_arrays([pa.array([1])] * 2, ["image", "image"]), path),
        "several columns image",
    ),
    "more columns": (lambda path: shard(path, extra=[1] * 4), "columns are image, label, extra and image, label"),
    "fewer columns": (lambda path: table({"image": pictures(4)}, path), "columns are image and image, label"),
    "another type": (lambda path: table({"image": pictures(4), "label": ["a"] * 4}, path), "hold string and int64"),
    "other names": (lambda path: shard(path, names=("y", "x")), "classes y, x and x, y"),
    "more names": (lambda path: shard(path, names=("x", "y", "z")), "classes x, y, z and x, y"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_file_that_is_no_part_of_the_table_is_named(tmp_path: Path, fault: str) -> None:
    rng = random.Random(fault)
    count, split = rng.randint(2, 4), rng.choice(["train", "test"])
    for number in range(count):
        for name in ("train", "test"):
            shard(tmp_path / f"{name}-{number}.parquet")
    victim = tmp_path / f"{split}-{rng.randint(1, count - 1)}.parquet"
    make, said = REFUSED[fault]
    make(victim)
    with pytest.raises(UserError) as refusal:
        source(tmp_path)
    assert victim.name in str(refusal.value) and said in str(refusal.value) and "\n" not in str(refusal.value)
    victim.unlink()
    assert len(source(tmp_path).train) == 4 * (count - (split == "train"))


@pytest.mark.parametrize("seed", range(8))
def test_files_without_rows_and_missing_files_are_reported(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(2, 5)
    empty = {number for number in range(count) if rng.random() < 0.3}
    missing = {number for number in range(count) if rng.random() < 0.3}
    names = {number: f"train-{number:05d}-of-{count:05d}" for number in range(count)}
    for number in {*range(count)} - missing:
        shard(tmp_path / f"{names[number]}.parquet", 0 if number in empty else 4)
    shard(tmp_path / "test.parquet", rng.choice([0, 4]))
    filled = {*range(count)} - missing - empty
    if not filled:
        with pytest.raises(UserError, match=r"--data"):
            source(tmp_path)
        return
    s = source(tmp_path, test_split=rng.choice([None, "none"]))
    assert s.report is not None and s.report.splits["train"]["images"] == 4 * len(filled)
    text = "\n".join(s.report.notes)
    assert all(names[number] in text for number in missing | empty)
    assert not any(names[number] in text for number in filled) or len(missing | empty | filled) > 10


def test_shards_of_two_writings_are_refused(tmp_path: Path) -> None:
    for count in (2, 3):
        for number in range(count):
            shard(tmp_path / "data" / f"train-{number:05d}-of-{count:05d}.parquet")
    with pytest.raises(
        UserError, match=r"data/train- has shards of 00002 and of 00003 files, as if it was written twice"
    ):
        source(tmp_path)
    for number in range(2):
        (tmp_path / "data" / f"train-{number:05d}-of-00002.parquet").rename(
            tmp_path / "data" / f"test-{number:05d}-of-00002.parquet"
        )
    assert (len((s := source(tmp_path)).train), len(s.test)) == (12, 8)


@pytest.mark.parametrize("kind", ["files", "saved"])
def test_a_training_split_without_rows_is_refused(tmp_path: Path, kind: str) -> None:
    """It is not replaced by the test split."""
    made = datasets.Dataset.from_dict({"image": pictures(6)}).cast_column("image", datasets.Image())
    splits = datasets.DatasetDict({"train": made.select([]), "test": made})
    if kind == "saved":
        splits.save_to_disk(tmp_path / "x")
    else:
        for name, part in splits.items():
            part.to_parquet(tmp_path / "x" / f"{name}.parquet")
    with pytest.raises(UserError, match=r"to train on"):
        source(tmp_path / "x")
    assert len(source(tmp_path / "x", train_split="test", test_split="none").train) == 5


def test_every_column_is_used_or_reported(tmp_path: Path) -> None:
    more = {
        "label": [[0, 1]] * 6,
        "mask": pictures(6),
        "fine": [0, 1] * 3,
        "split": ["train", "test"] * 3,
    }
    table({"image": pictures(6), **more}, tmp_path / "x.parquet", image=datasets.Image())
    text = str(source(tmp_path).report)
    assert "columns that are not used: label, mask, fine, split" in text
    assert "column label holds no classes, but list of int64" in text and "(train 3, test 3)" in text
    assert "label, mask, split" in str(source(tmp_path, label="fine").report)


def test_columns_of_another_name_in_the_test_split(tmp_path: Path) -> None:
    table({"img": pictures(6), "label": [0, 1] * 3}, tmp_path / "train.parquet", img=datasets.Image())
    table({"image": pictures(4), "target": [0, 1] * 2}, tmp_path / "test.parquet", image=datasets.Image())
    for settings in ({}, {"image": "img", "label": "label"}):
        s = source(tmp_path, **settings)
        assert len(s.test) == 4 and {s.test[None, n].label for n in range(4)} == {0, 1}
        assert "the images of test.parquet are those of column image" in str(s.report)
        assert "the labels of test.parquet are those of column target" in str(s.report)
    table({"image": pictures(4), "label": [0, 1] * 2}, tmp_path / "test.parquet", image=datasets.Image())
    table({"img": pictures(6)}, tmp_path / "train.parquet", img=datasets.Image())
    assert "the labels of test.parquet are not used" in str(source(tmp_path).report)


def test_the_exact_name_of_a_column_comes_first(tmp_path: Path) -> None:
    names = {"Image": pictures(6), "image": pictures(6), "Label": [0] * 6, "label": [0, 1] * 3}
    table(names, tmp_path / "x.parquet", image=datasets.Image(), Image=datasets.Image())
    s = source(tmp_path)
    assert (s.report is not None and s.report.images) == "column image" and s.classes == 2


def test_class_names_that_are_alike_or_too_few(tmp_path: Path) -> None:
    labels = ["Dog", "dog", "caf\u00e9", "cafe\u0301", " ", ""]
    table({"image": pictures(6), "label": labels}, tmp_path / "x.parquet", image=datasets.Image())
    s = source(tmp_path)
    assert s.classes == 4 and "'Dog' and 'dog'" in str(s.report)
    made = datasets.Dataset.from_dict({"image": pictures(4), "label": [0, 1, 2, 5]})
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    schema = made.data.table.schema.with_metadata(kinds.arrow_schema.metadata)
    parquet.write_table(made.data.table.replace_schema_metadata(schema.metadata), tmp_path / "x.parquet")
    with pytest.raises(
        UserError, match=r"column label has the class 5, and its type has the names of 2; .*--data\.label"
    ):
        source(tmp_path)


def test_bytes_are_bytes_however_dark(tmp_path: Path) -> None:
    """The range of a column of uint8 is that of its type."""
    rng = random.Random(0)
    for top in (1, 2, 200):
        values = [[[rng.randint(0, top) for _ in range(5)] for _ in range(5)] for _ in range(4)]
        parquet.write_table(
            pa.table({"image": pa.array(values, pa.list_(pa.list_(pa.uint8())))}), tmp_path / "x.parquet"
        )
        s = source(tmp_path)
        for number, row in enumerate(s.train.rows):
            assert s.train[None, number].image[0].tolist() == values[row]
