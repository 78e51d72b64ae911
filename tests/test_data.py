"""Anything a user has becomes images of one shape, by a number that never moves."""

import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import draw_images
from PIL import Image
from torch.utils.data import DataLoader

from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.data.decode import decode
from pretrain.data.find import EMBEDDED
from pretrain.data.image_cache import ImageCache, new_cache
from pretrain.data.images import Images, collate, on_device
from pretrain.data.loader import EpochSampler, make_loader
from pretrain.data.preload import preload
from pretrain.data.sources import open_data
from pretrain.infobatch.sampler import InfoBatch


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


def test_a_strange_folder(tmp_path: Path) -> None:
    """Names with brackets, spaces and letters of the world, capitals, depth, links, hidden and foreign files."""
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


def test_names_with_brackets(tmp_path: Path) -> None:
    rows = {"image": [plain(n) for n in range(4)]}
    path = tmp_path / "[x] *" / "train.parquet"
    path.parent.mkdir()
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(path)
    assert len(source(path).train) == len(source(path.parent).train) == 3


def test_the_same_images_the_same_numbers(pictures: Path) -> None:
    assert np.array_equal(source(pictures).train.rows, source(pictures).train.rows)


@pytest.mark.parametrize(
    ("image", "channels", "expected"),
    [
        (plain(100), 1, [100]),
        (plain(100), 3, [100, 100, 100]),
        (plain((10, 20, 30), "RGB"), 3, [10, 20, 30]),
        (plain((255, 0, 0), "RGB"), 1, [76]),
        (plain((0, 0, 0, 0), "RGBA"), 3, [255, 255, 255]),  # what is transparent is white, not what lies under it
        (plain((200, 0, 0, 255), "RGBA"), 3, [200, 0, 0]),
        (plain((50, 0), "LA"), 1, [255]),
        (plain(1, "1"), 1, [255]),
        (Image.fromarray(np.full((6, 6), 257 * 100, np.uint16)), 1, [100]),  # scaled, not clipped
        (Image.fromarray(np.full((6, 6), 257 * 100, np.int32)), 1, [100]),
        (plain((10, 20, 30), "RGB").convert("P", palette=Image.Palette.ADAPTIVE), 3, [10, 20, 30]),
        (plain((0, 255, 255, 0), "CMYK"), 3, [255, 0, 0]),
        (plain((200, 10, 20, 0), "RGBA"), 4, [200, 10, 20, 0]),  # four channels, none of which hides the others
        (plain((10, 20, 30), "RGB"), 4, [10, 20, 30, 255]),
        (plain((50, 9), "LA"), 4, [50, 50, 50, 9]),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_every_mode_is_read_for_what_it_shows(
    tmp_path: Path, image: Image.Image, channels: int, expected: list
) -> None:
    path = save(tmp_path, f"x.{'tif' if image.mode in ('CMYK', 'I') else 'png'}", image)
    decoded = decode({"bytes": None, "path": str(path)}, channels, None)
    assert decoded.dtype == torch.uint8 and decoded.shape == (channels, 6, 6)
    assert decoded[:, 0, 0].tolist() == expected


def test_upright_and_cropped_to_the_middle(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    path = save(tmp_path, "x.png", plain(size=(8, 4)), exif=exif)
    assert decode({"bytes": None, "path": str(path)}, 1, None).shape == (1, 8, 4)
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 200
    path = save(tmp_path, "y.png", Image.fromarray(wide))
    assert (decode({"bytes": None, "path": str(path)}, 1, 4) == 200).all()
    four = np.random.default_rng(0).integers(0, 255, (9, 7, 4)).astype(np.uint8)
    small = decode({"bytes": None, "path": str(save(tmp_path, "z.png", Image.fromarray(four)))}, 4, 5)
    for channel in range(4):  # each is resized alone
        path = save(tmp_path, "one.png", Image.fromarray(four[..., channel]))
        assert torch.equal(decode({"bytes": None, "path": str(path)}, 1, 5)[0], small[channel])


def test_a_float_image_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, "x.tif", Image.fromarray(np.ones((4, 4), np.float32)))
    with pytest.raises(ValueError, match="floating-point"):
        decode({"bytes": None, "path": str(path)}, 1, None)


def test_grey_and_colour_together_are_colour(tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path, f"{number}.png", plain())
    assert source(tmp_path).shape == (1, 6, 6)
    save(tmp_path, "9.png", plain((1, 2, 3), "RGB"))
    assert source(tmp_path).shape == (3, 6, 6)
    assert source(tmp_path, channels=1).shape == (1, 6, 6)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["./not/there", "/not/there", "~/not/there", "a/b/c"])
def test_a_path_that_is_not_there(path: str) -> None:
    with pytest.raises(UserError, match="there is no such file or folder"):
        source(path)


def test_empty_folders_and_other_files(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match="there are no images in it"):
            source(tmp_path)
        (tmp_path / "words.txt").write_text("x")
    with pytest.raises(UserError, match="must be a parquet file"):
        source(tmp_path / "words.txt")
    (tmp_path / "x.parquet").write_text("x")
    with pytest.raises(UserError, match="reading it failed"):
        source(tmp_path / "x.parquet")
    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="its columns are text"):
        source(tmp_path / "x.parquet")


def test_one_image_is_not_enough(tmp_path: Path) -> None:
    save(tmp_path, "x.png", plain())
    with pytest.raises(UserError, match="one image is not enough"):
        source(tmp_path)


BROKEN = {
    "truncated": lambda good: good[: len(good) // 2],
    "empty": lambda good: b"",
    "html": lambda good: b"<html>404</html>",
    "vanished": None,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_image_among_good_ones(tmp_path: Path, kind: str) -> None:
    folder = draw_images(tmp_path, 24)
    stop, skip = source(folder), source(folder, on_bad_image="skip")
    victim = Path(stop.train.table[int(stop.train.rows[5])]["image"]["path"])
    if BROKEN[kind] is None:
        victim.unlink()
    else:
        victim.write_bytes(BROKEN[kind](victim.read_bytes()))
    batch, problems = collate([stop.train[0, i] for i in range(8)])
    assert batch.index.tolist() == [0, 1, 2, 3, 4, ~5, 6, 7]
    with pytest.raises(UserError, match=rf"{victim.name} can't be used.*--on-bad-image skip"):
        stop.train.handle(problems)
    skip.train.handle(problems)
    skip.train.handle(problems)
    assert len(skip.train.skipped) == 1
    assert [len(b.index) for b in skip.train.batches(range(8), 4)] == [4, 3]


def test_sizes_that_differ(tmp_path: Path) -> None:
    for number, size in enumerate([(6, 6), (6, 6), (8, 6), (6, 6)]):
        save(tmp_path, f"{number}.png", plain(size=size))
    s = source(tmp_path)
    problems = [image.problem for i in range(len(s.train)) if (image := s.train[0, i]).problem]
    problems += [image.problem for i in range(len(s.test)) if (image := s.test[0, i]).problem]
    assert len(problems) == 1 and "it is 8x6 where most images are 6x6; resize all with --data.size N" in problems[0]
    s = source(tmp_path, size=4)
    assert s.shape == (1, 4, 4) and not any(s.train[0, i].problem for i in range(len(s.train)))


# -- visits ----------------------------------------------------------------------------------------


def visited(images: Images, epoch: int, index: list[int]) -> torch.Tensor:
    """What the network sees of these visits, float32 [B, C, H, W]."""
    plain, problems = images.__getitems__([(epoch, number) for number in index])
    assert not problems
    return images.augmented(on_device(plain, torch.device("cpu")), epoch).image


@pytest.mark.parametrize("size", [None, 12], ids=["cropped on the device", "cropped as they are read"])
def test_augmentation_is_a_function_of_epoch_and_index(pictures: Path, size: int | None) -> None:
    images = source(pictures, crop=0.3, flip=True, size=size).train
    state, order = torch.get_rng_state(), [*range(20)]
    first = visited(images, 2, order)
    torch.manual_seed(5)
    assert torch.equal(visited(images, 2, order[::-1]), first.flip(0))
    assert all(torch.equal(visited(images, 2, [i])[0], first[i]) for i in order)
    assert (visited(images, 3, order) != first).flatten(1).any(dim=1).float().mean() > 0.9
    untouched = source(pictures, size=size).train
    assert all(torch.equal(images[None, i].image, untouched[7, i].image) for i in order)
    assert torch.equal(images[None, 0].image, next(images.batches([0], 1)).image[0])
    torch.set_rng_state(state)
    visited(images, 2, [0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_hands_out_the_plan_epoch_after_epoch(pictures: Path, workers: int) -> None:
    images: Images = source(pictures, flip=True, workers=workers).train
    infobatch = InfoBatch(len(images), epochs=3)
    batches: DataLoader = make_loader(images, EpochSampler(infobatch), 8)
    state = torch.get_rng_state()
    for epoch in infobatch.epochs():
        seen = []
        for batch, problems in batches:
            assert not problems
            for image, index in zip(batch.image, batch.index.tolist(), strict=True):
                assert torch.equal(image, images[epoch, index].image)
            seen += batch.index.tolist()
            infobatch(batch.image.float().mean((1, 2, 3)), batch.index)
        assert seen == infobatch.plan.order.tolist()
    assert torch.equal(torch.get_rng_state(), state)


def test_pixels_are_between_minus_one_and_one(pictures: Path) -> None:
    images = source(pictures).train
    batch = on_device(next(iter(images.batches(range(9), 9))), torch.device("cpu"))
    assert batch.image.dtype == torch.float32 and batch.image.min() == -1 and batch.image.max() <= 1


def test_a_random_crop_is_cut_from_the_whole_image(tmp_path: Path) -> None:
    """Not from what is left of it at the size; held-out images are cropped to the middle as ever."""
    halves = np.zeros((40, 120), dtype=np.uint8)
    halves[:, 60:] = 240  # what lies outside of the middle 40 x 40 is nothing but black and white
    for number in range(4):
        save(tmp_path, f"{number}.png", Image.fromarray(halves))
    images = source(tmp_path, size=16, crop=0.02).train
    seen = [images[epoch, 0].image for epoch in range(30)]
    assert all(image.shape == (1, 16, 16) for image in seen)
    assert {0, 240} <= {int(image.float().mean()) for image in seen}, "some crops lie wholly on one side"
    assert 100 < images[None, 0].image.float().mean() < 140


# -- decoded once ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("settings", [{}, {"flip": True, "size": 9, "channels": 3}, {"crop": 0.3}], ids=str)
def test_images_are_read_once_and_are_those_that_are_read_anew(
    pictures: Path, settings: dict, workers: int, monkeypatch
) -> None:
    kept, anew = (source(pictures, workers=workers, **settings).train for _ in range(2))
    anew.cache = None
    monkeypatch.setattr(Images, "cacheable", False)
    for images in (kept, anew):
        preload(images, torch.device("cpu"), print)
    assert kept.cache and kept.cache.complete and anew.cache is None
    order = InfoBatch(len(kept), epochs=3), InfoBatch(len(kept), epochs=3)
    pairs = [
        make_loader(images, EpochSampler(infobatch), 8) for images, infobatch in zip((kept, anew), order, strict=True)
    ]
    assert [loader.num_workers for loader in pairs] == [0, workers]
    for _ in zip(order[0].epochs(), order[1].epochs(), strict=True):
        for (one, _), (other, _) in zip(*pairs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
            for infobatch in order:
                infobatch(one.image.float().mean((1, 2, 3)), one.index)
    expected = [batch for batch in anew.batches(range(len(anew)), 7)]
    monkeypatch.setattr("pretrain.data.images.decode", None)  # nothing is read any more
    for one, other in zip(kept.batches(range(len(kept)), 7), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_slot_that_does_not_count_is_read_like_any_other(pictures: Path) -> None:
    images = source(pictures).train
    for _ in range(2):  # read, then kept
        batch, problems = images.__getitems__([(0, 3), (0, ~3)])
        assert batch.index.tolist() == [3, ~3] and torch.equal(batch.image[0], batch.image[1]) and not problems


def test_an_image_that_can_not_be_read_is_not_kept(tmp_path: Path) -> None:
    """It is tried at every visit; once all were read, no more."""
    images = source(draw_images(tmp_path, 20), on_bad_image="skip").train
    path = Path(images.name_of(3))
    good = path.read_bytes()
    path.write_bytes(good[:40])
    for epoch in range(2):
        batch, (problem,) = images.__getitems__([(epoch, 2), (epoch, 3)])
        assert path.name in problem and batch.index.tolist() == [2, ~3]
        assert (batch.image[1] == 0).all() and batch.label[1] == -1 and batch.label[0] >= 0
    path.write_bytes(good)
    batch, problems = images.__getitems__([(2, 2), (2, 3)])
    assert not problems and batch.index.tolist() == [2, 3] and torch.equal(batch.image[1], images[None, 3].image)
    path.write_bytes(b"")
    assert torch.equal(images.__getitems__([(3, 3)])[0].image, batch.image[1:])
    images = source(tmp_path, on_bad_image="skip").train
    preload(images, torch.device("cpu"), print)
    (name,) = images.skipped
    assert path.name in name
    path.write_bytes(good)
    batch, problems = images.__getitems__([(3, 3), (3, ~4)])
    assert not problems and batch.index.tolist() == [~3, ~4]
    assert (batch.image[0] == 0).all() and batch.label.tolist() == [-1, images[None, 4].label]


def test_who_is_told_to_stop_reads_no_further(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pretrain.data.preload.BATCH", 5)
    images, asked = source(draw_images(tmp_path, 20)).train, []
    preload(images, torch.device("cpu"), print, lambda: asked.append(1) or len(asked) == 2)
    assert images.cache and not images.cache.complete and images.cache.present.tolist() == [True] * 10 + [False] * 8
    batch, problems = images.__getitems__([(0, 2), (0, 12)])
    assert not problems and torch.equal(batch.image[1], images[None, 12].image)


def test_a_bad_image_is_named_before_the_training(tmp_path: Path) -> None:
    images = source(draw_images(tmp_path, 20)).train
    path = Path(images.name_of(3))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=rf"{path.name} can't be used: .*; repair or remove it, or skip such images"):
        preload(images, torch.device("cpu"), print)


def test_what_is_not_kept(tmp_path: Path, monkeypatch) -> None:
    """Too many; ones of which a crop wants more than an evaluation; in workers that are spawned; on strange devices."""
    folder = draw_images(tmp_path, 20)
    images, cpu = source(folder).train, torch.device("cpu")
    assert pickle.loads(pickle.dumps(images)).cache is None
    assert source(folder, size=8, crop=0.5).train.cache is None and source(folder, crop=0.5).train.cache
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2**60))  # who start together share what is free
    assert source(folder).train.cache is None
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    size = len(images) * 12 * 12
    for most, fits in ((size - 1, False), (size, True)):
        monkeypatch.setattr("pretrain.data.image_cache.MAX_HOST_BYTES", most)
        assert (source(folder).train.cache is not None) == fits and source(folder).test.cache
    assert new_cache(3, (1, 4, 4), cpu) and new_cache(3, (1, 4, 4), torch.device("meta")) is None
    for free, fits in ((10 * 48 - 1, False), (10 * 48, True)):  # of an accelerator a tenth, however much that is
        monkeypatch.setattr("pretrain.data.image_cache.MAX_HOST_BYTES", 0)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        monkeypatch.setattr("pretrain.data.image_cache.ImageCache", lambda count, shape, device: (count, shape, device))
        assert (new_cache(3, (1, 4, 4), torch.device("cuda")) is not None) == fits


def test_taking_what_a_device_keeps_waits_for_nothing() -> None:
    """On the meta device, where whatever needs a value raises."""
    kept = ImageCache(5, (3, 4, 4), torch.device("meta"))
    number = torch.tensor([4, 0])
    kept.put(number, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([1, 2]))
    image, label = kept.get(number)
    assert kept.present.tolist() == [True, False, False, False, True]
    assert image.shape == (2, 3, 4, 4) and image.device.type == label.device.type == "meta"
