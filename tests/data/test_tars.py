"""WebDataset's tar files: samples, labels, splits, what is damaged or not used, and training on them."""

import gzip
import io
import json
import multiprocessing
import random
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import tifffile
import torch
from autoencoders import encode
from parquet_files import pictures as encoded
from parquet_files import table
from PIL import Image
from programs import common, same, train
from tar_files import add, png, shards_of, write_tar

from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.data import tars
from pretrain.data.fingerprint import describe_changes, digest, fingerprint, fingerprints
from pretrain.data.images import Images
from pretrain.data.loader import make_loader
from pretrain.data.sources import Source, open_data


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where indices are kept."""
    folder = tmp_path_factory.mktemp("index")
    monkeypatch.setattr(tars, "cached_assets_path", lambda *_: folder)
    return folder


def source(path: object, **settings) -> Source:
    return open_data(Data(source=str(path), **settings), seed=0)


def refused(path: object, **settings) -> str:
    with pytest.raises(UserError) as refusal:
        source(path, **settings)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def everything(s: Source) -> list[tuple[int, str]]:
    """The value and the class of each image, in the order of the table."""
    found = {}
    for images in (s.train, s.test):
        for number in range(len(images)):
            item = images[None, number]
            assert not item.problem, item.problem
            name = s.class_names[item.label] if item.label >= 0 else ""
            found[id(images.table), int(images.rows[number])] = int(item.image.float().mean()), name
    return [found[key] for key in sorted(found, key=lambda key: key[1])]


@pytest.mark.parametrize("seed", range(10))
def test_samples_are_those_that_were_written(tmp_path: Path, seed: int) -> None:
    """In any form of tar, with names of any length and letters, labels in any of the ways that there are."""
    rng = random.Random(seed)
    where = rng.choice(["cls", "cls name", "json", "json asked", "txt asked", "none"])
    names = {"cls": ["3", "10", "7"], "cls name": ["cat", "a dog", "ö"]}.get(where, ["x", "y", "z"])
    form = rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    prefix = rng.choice(["", "./", "deep/" * 30, "a.b/", "猫 "])
    expected, value = [], 0
    for shard in range(rng.randint(1, 3)):
        files = []
        for number in range(rng.randint(4, 8)):
            value += 1
            label = rng.choice([*names, ""])
            kind = rng.choice(["PNG", "JPEG"])
            files.append((f"{prefix}{number:04d}.{'png' if kind == 'PNG' else 'JPG'}", png(value, kind=kind)))
            if where.startswith("cls"):
                files.append((f"{prefix}{number:04d}.cls", f"{label}\n".encode()))
            elif where.startswith("json"):
                field = "label" if where == "json" else "kind"
                files.append((f"{prefix}{number:04d}.json", json.dumps({field: label, "w": [1]}).encode()))
            elif where == "txt asked":
                files.append((f"{prefix}{number:04d}.txt", label.encode()))
            expected.append((value, label if where != "none" else ""))
        write_tar(tmp_path / "data" / f"x-{shard:03d}.tar", files, form)
    asked = {"json asked": "kind", "txt asked": "txt"}.get(where)
    s = source(tmp_path / "data", label=asked)
    assert everything(s) == expected
    named = sorted({label for _, label in expected} - {""}, key=int if where == "cls" else str)
    assert [*s.class_names] == named
    assert all(images.name_of(0).startswith("x-00") for images in (s.train, s.test))


def test_splits_and_classes_by_the_names_of_tars(tmp_path: Path) -> None:
    def shard(name: str, labels: str) -> None:
        files = [
            (f"{n}.{e}", c) for n, label in enumerate(labels) for e, c in (("png", png(n)), ("cls", label.encode()))
        ]
        write_tar(tmp_path / f"{name}.tar", files)

    shard("train-000000", "ababab")
    shard("train-000001", "ccc")
    shard("val-000000", "abz")
    s = source(tmp_path)
    assert (len(s.train), len(s.test), s.class_names) == (9, 3, ("a", "b", "c"))
    assert "1 images are of classes that the training data does not have" in str(s.report)
    assert [s.test[None, n].label for n in range(3)] == [0, 1, -1]
    one = source(tmp_path / "train-000000.tar")
    assert (len(one.train), len(one.test)) == (5, 1)
    some = source(tmp_path / "train-{000000..000001}.tar")
    assert len(some.train) + len(some.test) == 9
    assert "there are no files train-000002.tar" in refused(tmp_path / "train-{000000..000002}.tar")
    assert "must stand in the name of tar files of one folder" in refused(tmp_path / "{0..1}" / "x.tar")
    assert len(source(tmp_path, train_split="val", test_split="train").train) == 3
    assert "there are no tar files of that name" in refused(tmp_path, train_split="nothing")
    (tmp_path / "val-000000.tar").rename(tmp_path / "more.tar")
    assert "all tar files are used: " in str(source(tmp_path).report)


def test_images_of_a_name_of_their_own(tmp_path: Path) -> None:
    files = [(f"{n}.{e}", png(9 * k + n)) for n in range(6) for k, e in enumerate(("png", "mask.png"))]
    write_tar(tmp_path / "x.tar", [*files, ("9.mask.png", png())])
    said = refused(tmp_path)
    assert "6 samples have several images (x.tar/0, of .mask.png, .png); name their extension with --data.image" in said
    s = source(tmp_path, image="png")
    assert [value for value, _ in everything(s)] == [*range(6)]
    text = str(s.report)
    assert "1 samples have no image and are not used, the first: x.tar/9" in text and ".mask.png 7" in text
    assert [value for value, _ in everything(source(tmp_path, image=".mask.png"))][:6] == [*range(9, 15)]
    assert "have no such files; they have .mask.png, .png" in refused(tmp_path, image="jpg")
    assert "have no .json and no such files" in refused(tmp_path, image="png", label="kind")


def test_what_is_not_used_is_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in range(4):
            add(tar, f"{number}.png", png(number))
            add(tar, f"{number}.json", json.dumps({"caption": "x"}).encode())
        for name in (".hidden.png", "__MACOSX/a.png", ".git/a.png", "README"):
            add(tar, name, b"x")
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, kind in (("l.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE), ("f.png", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "0.png"
            tar.addfile(member)
    write_tar(tmp_path / "y.tar", [])
    (tmp_path / "z.tar.gz").write_bytes(gzip.compress(b"x"))
    (tmp_path / "x_stats.json").write_text("{}")
    s = source(tmp_path)
    assert s.report is not None and sorted(value for value, _ in everything(s)) == [0, 1, 2, 3]
    assert dict(s.report.passed_over) == {
        "hidden file in a tar": 3,
        "file without an extension in a tar": 1,
        "link in a tar": 2,
        "special file in a tar": 1,
        ".gz file": 1,
        ".json file": 1,
    }
    text = "\n".join(s.report.notes)
    assert "tar files without samples" in text and "y.tar" in text and "1 compressed files beside" in text
    assert "fields of .json that are not used: caption" in text


FAULTS = {  # what is wrong with a tar, and what is said of it
    "empty": (lambda content: b"", "it is empty"),
    "pointer": (lambda content: b"version https://git-lfs.github.com/spec/v1\noid x\n" + bytes(600), "git lfs pull"),
    "no end": (lambda content: content[: len(content.rstrip(b"\0")) // 512 * 512 + 512], "it is cut off at byte"),
    "cut in a file": (lambda content: content[:600], "unexpected end of data"),
    "cut in a header": (lambda content: content[: 1024 + 300], "it is cut off at byte 1,024"),
    "overwritten": (lambda content: content[:1024] + b"x" * 512 + content[1536:], "it is damaged at byte 1,024"),
    "joined": (lambda content: content + content, "there is more behind its end"),
    "packed": (gzip.compress, "it is compressed, and images are read at their place in it; unpack it (gunzip)"),
    "no tar": (lambda content: b"GIF89a" + content[6:], "can't be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tar_that_can_not_be_read_is_named(tmp_path: Path, fault: str) -> None:
    files = [(f"{n}.{e}", c) for n in range(6) for e, c in (("png", png(n)), ("cls", b"%d" % (n % 2)))]
    for shard in range(3):
        write_tar(tmp_path / f"x-{shard}.tar", files)
    act, said = FAULTS[fault]
    victim = tmp_path / "x-1.tar"
    victim.write_bytes(act(victim.read_bytes()))
    message = refused(tmp_path)
    assert "x-1.tar can't be read: " in message and said in message
    victim.unlink()
    s = source(tmp_path)
    assert len(s.train) + len(s.test) == 12
    assert f"tar files that are not among those numbered alike: {tmp_path.name}/x-1.tar" in str(s.report)


def test_shards_with_a_total(tmp_path: Path) -> None:
    for number in (0, 2):
        write_tar(tmp_path / "d" / f"x-{number:05d}-of-00003.tar", [(f"{n}.png", png(n)) for n in range(4)])
    assert "shards that are not among the files: d/x-00001-of-00003" in str(source(tmp_path / "d").report)
    write_tar(tmp_path / "d" / "x-00000-of-00002.tar", [("1.png", png())])
    assert "as if it was written twice" in refused(tmp_path / "d")


def test_numbers_that_are_no_shards_are_not_missing(tmp_path: Path) -> None:
    for name in ("n01440764", "n01443537"):
        write_tar(tmp_path / f"{name}.tar", [(f"{n}.png", png(n)) for n in range(4)])
    assert "numbered" not in str(source(tmp_path).report)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("0.png", png()), ("1.png", png()), ("0.PNG", png())])
    assert "x.tar has two files 0.png; write it again" in refused(tmp_path)


def test_files_of_a_sample_that_lie_apart_are_one_sample(tmp_path: Path) -> None:
    files = [(f"{n}.png", png(n)) for n in range(6)] + [(f"{n}.cls", b"ab"[n % 2 : n % 2 + 1]) for n in range(6)]
    assert everything(source(write_tar(tmp_path / "x.tar", files))) == [(n, "ab"[n % 2]) for n in range(6)]


@pytest.mark.parametrize(
    ("name", "content"), [("cls", b"\xff"), ("json", b"{"), ("json", b"[1]"), ("cls", b"x" * 2**21)]
)
def test_labels_that_can_not_be_read_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    write_tar(tmp_path / "x.tar", [("0.png", png()), (f"0.{name}", b"{}"), ("1.png", png()), (f"1.{name}", content)])
    assert f"the label in x.tar/1.{name} can't be read" in refused(tmp_path)


def test_tars_beside_other_data(tmp_path: Path) -> None:
    """Beside images they are what was unpacked; parquet files beside them describe them, unless they hold images."""
    write_tar(tmp_path / "0.tar", [(f"{n}.png", png(n)) for n in range(6)])
    table({"caption": ["x"]}, tmp_path / "0.parquet")
    s = source(tmp_path)
    assert len(s.train) == 5 and s.report is not None and s.report.passed_over[".parquet file"] == 1
    table({"image": encoded(4)}, tmp_path / "1.parquet", image=datasets.Image())
    assert "it holds 1 tar files and the parquet file" in refused(tmp_path)
    (tmp_path / "1.parquet").unlink()
    for number in range(4):
        Image.new("L", (5, 5)).save(tmp_path / f"{number}.png")
    s = source(tmp_path)
    assert s.shape == (1, 5, 5) and s.report is not None and s.report.passed_over[".tar file"] == 1
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    assert "must be a parquet file or a tar file, or give a folder of images; unpack it" in refused(
        tmp_path / "x.tar.gz"
    )


def test_an_image_that_is_gone_or_no_image_is_named(tmp_path: Path) -> None:
    files = [(f"{n}.png", png(n)) for n in range(8)]
    files[3] = ("3.png", b"no image")
    s = source(write_tar(tmp_path / "x.tar", files), test_split="none")
    found = {images.name_of(n): images[None, n].problem for images in (s.train, s.test) for n in range(len(images))}
    assert [name for name, problem in found.items() if problem] == ["x.tar/3"] and "no image of these" in found[
        "x.tar/3"
    ]
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:700])
    assert "x.tar ends before it does" in s.train[None, len(s.train) - 1].problem
    (tmp_path / "x.tar").unlink()
    assert "No such file" in s.train[None, 0].problem


def test_an_index_is_kept_and_made_again_if_the_tar_has_changed(tmp_path: Path, cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(tars, "SLOW", -1.0)
    file = write_tar(tmp_path / "x.tar", [(f"{n}.png", png(n)) for n in range(6)])
    first = everything(source(file))
    (kept,) = cache.iterdir()
    read = tars._read_members
    monkeypatch.setattr(tars, "_read_members", lambda file: pytest.fail("it was indexed before"))
    assert everything(source(file)) == first
    monkeypatch.setattr(tars, "_read_members", read)
    kept.write_bytes(b"damaged")
    assert everything(source(file)) == first
    write_tar(file, [(f"{n}.png", png(n + 50)) for n in range(7)])
    assert [value for value, _ in everything(source(file))] == [*range(50, 57)]


def test_the_same_images_as_files_are_the_same_samples(pictures: Path, tmp_path: Path) -> None:
    shards = shards_of(pictures, tmp_path / "shards")
    s, files = source(shards), source(pictures)
    assert (len(s.train), len(s.test), s.shape, s.classes) == (43, 4, files.shape, files.classes)
    numbers = {name.rpartition("/")[2]: n for n, name in enumerate(map(files.train.name_of, range(43)))}
    for n in range(43):
        name = f"{s.train.name_of(n).rpartition('/')[2]}.png"
        if name in numbers:
            one, other = s.train[None, n], files.train[None, numbers[name]]
            assert torch.equal(one.image, other.image) and one.label == other.label


def test_changes_of_a_tar_are_noticed_and_a_move_is_not(pictures: Path, tmp_path: Path) -> None:
    shards = shards_of(pictures, tmp_path / "shards")
    before = source(shards)
    marks, some = fingerprints(before), digest(before.train, np.arange(5))
    moved = source(shards.rename(tmp_path / "elsewhere"))
    assert describe_changes(marks, fingerprints(moved), moved) == "" and digest(moved.train, np.arange(5)) == some
    victim = tmp_path / "elsewhere" / "images-000001.tar"
    with tarfile.open(victim) as tar:
        files = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    content = files[0][1]
    for changed in (content[:-1] + b"x", png(9, 12)):
        now = source(write_tar(victim, [(files[0][0], changed), *files[1:]]).parent)
        assert "new or changed, the first: images-000001.tar/0016" in describe_changes(marks, fingerprints(now), now)
    now = source(write_tar(victim, [files[0], (files[1][0], b"1" if files[1][1] == b"0" else b"0"), *files[2:]]).parent)
    assert "images-000001.tar/0016" in describe_changes(marks, fingerprints(now), now)


def test_large_tars_are_fingerprinted_without_reading_them(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    s = source(shards_of(pictures, tmp_path / "shards"))
    monkeypatch.setattr("pretrain.data.fingerprint.MAX_HASHED_BYTES", 1000)
    monkeypatch.setattr("pretrain.data.fingerprint.read_packed", lambda *_: pytest.fail("it was read"))
    assert len(fingerprint(s.train)) == 43


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_from_tars(pictures: Path, tmp_path: Path, start: str) -> None:
    images: Images = source(shards_of(pictures, tmp_path / "shards"), workers=1).train
    expected = torch.stack([images[None, n].image for n in range(len(images))])
    loader = make_loader(images, [(None, number) for number in range(len(images))], 8)
    loader.multiprocessing_context = multiprocessing.get_context(start)
    for batch, problems in loader:
        assert not problems and torch.equal(batch.image, expected[batch.index])


def test_memory_of_a_large_tar(tmp_path: Path) -> None:
    """At most 100 bytes a sample: offsets, sizes and short names."""
    content = png()
    write_tar(tmp_path / "x.tar", ((f"{n:06d}.png", content) for n in range(3000)))
    made = source(tmp_path).train.table
    assert made.data.nbytes / len(made) < 100


def test_a_run_on_tars_is_resumed_to_the_bit(pictures: Path, tmp_path: Path) -> None:
    shards = shards_of(pictures, tmp_path / "shards")
    every = ["--checkpoint.every", 1, "--checkpoint.keep", 100, "--data.workers", 1]
    train("train_mae.py", *common(shards, tmp_path / "whole", 2), *every)
    train("train_mae.py", *common(shards, tmp_path / "part", 2), *every)
    for path in sorted((tmp_path / "part" / "checkpoints").iterdir())[3:]:
        shutil.rmtree(path)
    train("train_mae.py", *common(shards, tmp_path / "part", 2), *every, "--resume")
    assert same(tmp_path / "whole", tmp_path / "part")
    found = json.loads((tmp_path / "whole" / "data.json").read_text())
    assert found["images"] == ".png files in 3 tar files" and found["labels"] == ".cls files"


def test_latents_of_tars_are_those_of_files(pictures: Path, tmp_path: Path, vaes: Path) -> None:
    found = [
        open_data(Data(source=str(encode(vaes / "kl", folder, tmp_path / name))), 0)
        for name, folder in (("one", pictures), ("other", shards_of(pictures, tmp_path / "shards")))
    ]
    assert found[0].shape == found[1].shape and len(found[0].train) == len(found[1].train)


def test_five_bands_in_a_tar(tmp_path: Path) -> None:
    arrays = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 5)).astype(np.uint8)
    files = []
    for number, array in enumerate(arrays):
        stream = io.BytesIO()
        tifffile.imwrite(stream, array, photometric="minisblack", planarconfig="contig", extrasamples=[0] * 4)
        files.append((f"{number}.tif", stream.getvalue()))
    s = source(write_tar(tmp_path / "x.tar", files))
    assert s.shape == (5, 5, 4)
    assert all(
        (s.train[None, n].image.numpy() == np.moveaxis(arrays[row], 2, 0)).all() for n, row in enumerate(s.train.rows)
    )
