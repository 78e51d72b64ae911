"""What a folder, a table and a container mean: laws over generated layouts, tables and pixels."""

import io
import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import tifffile
from PIL import Image, PngImagePlugin
from pyarrow import parquet

from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.data import decode as decoding
from pretrain.data.decode import Reading, decode
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


def table(rows: dict, path: Path, **features) -> None:
    made = datasets.Dataset.from_dict(rows)
    for name, kind in features.items():
        made = made.cast_column(name, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.to_parquet(path)


def pictures(count: int) -> list[dict]:
    stream = io.BytesIO()
    Image.new("L", (4, 4), 7).save(stream, "PNG")
    return [{"bytes": stream.getvalue(), "path": None}] * count


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


# -- tables ----------------------------------------------------------------------------------------


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


def test_a_table_reads_no_file_outside_of_its_folder(tmp_path: Path) -> None:
    draw(tmp_path / "secret", 1)
    draw(tmp_path / "data" / "images", 2)
    (tmp_path / "data" / "images" / "link.png").symlink_to(tmp_path / "secret" / "0.png")
    inside = ["images/0.png", "images/1.png", str(tmp_path / "data" / "images" / "0.png")]
    outside = ["../secret/0.png", str(tmp_path / "secret" / "0.png"), "images/link.png"]
    rows = [{"bytes": None, "path": path} for path in inside + outside]
    parquet.write_table(pa.table({"image": rows}), tmp_path / "data" / "x.parquet")
    s = source(tmp_path / "data" / "x.parquet", size=4)
    found = [images[None, n] for images in (s.train, s.test) for n in range(len(images))]
    problems = [item.problem for item in found if item.problem]
    assert len(problems) == 3 and all("leads out of the folder" in problem for problem in problems)


# -- pixels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("top", [1, 255, 1023, 4095, 16383, 65535])
def test_arrays_keep_their_grey_levels(tmp_path: Path, top: int, seed: int) -> None:
    """Black is black, white is white, whatever type and order of axes a table has."""
    rng = np.random.default_rng(seed)
    channels = int(rng.choice([1, 3]))
    array = rng.integers(0, top + 1, (5, 6, 7, channels))
    array[:, 0, 0], array[:, -1, -1] = 0, top
    kinds = [np.int64, np.float32] + ([np.uint8] if top == 255 else []) + ([np.uint16] if top > 255 else [])
    array = array.astype(kinds[seed % len(kinds)])
    stored = np.moveaxis(array, -1, 1) if seed % 2 else array[..., 0] if channels == 1 else array
    table({"image": stored.tolist() if seed % 3 else [*stored]}, tmp_path / "x.parquet")
    s = source(tmp_path / "x.parquet")
    assert s.shape == (channels, 6, 7)
    for images in (s.train, s.test):
        for number, row in enumerate(images.rows):
            expected = np.moveaxis(array[row], -1, 0) * (255 / top)
            assert np.abs(images[None, number].image.numpy() - expected).max() <= 0.51
    if top != 255:
        assert f"values 0 to {top}" in str(s.report)


def test_array_columns_and_ranges(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    array = np.linspace(-1, 1, 4 * 36).reshape(4, 6, 6).astype(np.float32)
    table({"pixels": [*array]}, file, pixels=datasets.Array2D((6, 6), "float32"))
    s = source(file)
    everything = np.stack([s.train[None, n].image.numpy()[0] for n in range(3)])
    assert np.abs(everything - (array[s.train.rows] + 1) * 127.5).max() <= 0.51
    s = source(file, range=(0, 0.5))
    assert {0, 255} <= {*np.unique([s.train[None, n].image.numpy() for n in range(3)])}
    table({"image": (1000 * array).tolist()}, file)
    with pytest.raises(UserError, match=r"values from -1000 to 1000 .*set --data\.range LOW HIGH"):
        source(file)
    assert source(file, range=(-1000, 1000)).train[None, 0].problem == ""
    table({"image": [[1, 2, 3]] * 4}, file)
    with pytest.raises(UserError, match="no height and width"):
        source(file)


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits, uint16 [H, W, C]; Pillow writes grey ones only."""
    height, width, count = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[count], 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    made = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


@pytest.mark.parametrize("container", ["png", "tif", "tifffile"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_twelve_bits_in_sixteen(tmp_path: Path, container: str, count: int) -> None:
    rng, arrays = np.random.default_rng(count), []
    for number in range(6):
        pixels = rng.integers(0, 4096, (6, 7, count)).astype(np.uint16)
        pixels[0, 0], pixels[1, 1] = 0, 4095
        path = tmp_path / f"{number}.{container[:3]}"
        if container == "png":
            if count == 4:
                pixels[..., 3] = 65535  # alpha
            path.write_bytes(png16(pixels))
        elif container == "tif" and count == 1:
            Image.fromarray(pixels[..., 0].astype(np.int32)).save(path)
        else:
            more = {"extrasamples": ["unspecified"]} if count == 4 else {}
            tifffile.imwrite(path, pixels, photometric="rgb" if count > 1 else "minisblack", **more)
        arrays.append(pixels)
    s = source(tmp_path, channels=count)
    assert "values 0 to 4095" in str(s.report)
    for number, row in enumerate(s.train.rows):
        image, expected = s.train[None, number].image.numpy(), np.moveaxis(arrays[row], -1, 0) / 4095 * 255
        assert np.abs(image - expected.clip(0, 255)).max() <= 0.51
    (tmp_path / "5.png").write_bytes(png16(np.full((6, 7, 1), 60000, np.uint16)))
    s = source(tmp_path, channels=count, range=(0, 4095))
    assert all(not s.train[None, n].problem for n in range(len(s.train)))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_all_sixteen_bits_of_a_png_are_read(count: int) -> None:
    pixels = np.random.default_rng(count).integers(0, 65536, (9, 5, count)).astype(np.uint16)
    with Image.open(io.BytesIO(png16(pixels))) as picture:
        values = decoding._deep_png(picture, io.BytesIO(png16(pixels)))
    assert (values.pixels == pixels).all() and values.has_alpha == (count != 3)


def test_a_value_above_the_range_is_a_bad_image() -> None:
    content = png16(np.full((4, 4, 1), 5000, np.uint16))
    with pytest.raises(ValueError, match=r"span 5000 to 5000, more than the 0 to 4095 .*--data\.range"):
        decode({"bytes": content, "path": None}, 1, None, Reading((0.0, 4095.0)))
    assert decode({"bytes": content, "path": None}, 1, None, Reading((0.0, 4095.0), is_set=True)).max() == 255


def tiff(pixels: np.ndarray, **options) -> dict:
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, **options)
    return {"bytes": stream.getvalue(), "path": None}


def test_extra_bands_are_read_or_refused(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 4)).astype(np.uint8)
    for options in ({}, {"compression": "zlib"}, {"planarconfig": "separate"}):
        stored = np.moveaxis(pixels, 2, 0) if "planarconfig" in options else pixels
        image = tiff(np.ascontiguousarray(stored), photometric="rgb", extrasamples=["unspecified"], **options)
        assert (decode(image, 4, None).numpy() == np.moveaxis(pixels, 2, 0)).all()
        assert (decode(image, 3, None).numpy() == np.moveaxis(pixels[..., :3], 2, 0)).all()
    for number in range(4):
        (tmp_path / f"{number}.tif").write_bytes(image["bytes"])
    assert "fourth band" in str(source(tmp_path).report) and "fourth band" not in str(
        source(tmp_path, channels=4).report
    )
    for count in (2, 5):
        many = np.zeros((6, 7, count), np.uint8)
        image = tiff(many, photometric="minisblack", planarconfig="contig", extrasamples=["unspecified"] * (count - 1))
        with pytest.raises(ValueError, match=f"{count} bands of 8 bits, and 1, 3 or 4 bands can be used"):
            decode(image, 3, None)


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PNG", "WEBP"])
def test_several_pages_are_refused_unless_the_first_is_asked_for(kind: str) -> None:
    frames, stream = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (200, 100, 0)], io.BytesIO()
    frames[0].save(stream, kind, save_all=True, append_images=frames[1:])
    image = {"bytes": stream.getvalue(), "path": None}
    with pytest.raises(ValueError, match=r"3 pages or frames; .*--data\.pages first"):
        decode(image, 3, None)
    assert decode(image, 3, None, Reading(pages="first")).float().mean((1, 2))[0] > 190


def test_large_chunks_and_scans_are_read(monkeypatch) -> None:
    text, stream = PngImagePlugin.PngInfo(), io.BytesIO()
    text.add_text("prompt", "x" * 3_000_000, zip=True)
    Image.new("L", (4, 4), 7).save(stream, "PNG", pnginfo=text, icc_profile=bytes(3_000_000))
    assert (decode({"bytes": stream.getvalue(), "path": None}, 1, None) == 7).all()
    assert decoding.MAX_PIXELS > 400e6 and Image.MAX_IMAGE_PIXELS is None
    scan_, stream = Image.new("1", (10_000, 9_500), 1), io.BytesIO()
    scan_.save(stream, "PNG")
    assert (decode({"bytes": stream.getvalue(), "path": None}, 1, 4) == 255).all()
    monkeypatch.setattr(decoding, "MAX_PIXELS", 15)
    with pytest.raises(ValueError, match="megapixels, above"):
        decode({"bytes": pictures(1)[0]["bytes"], "path": None}, 1, None)


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
