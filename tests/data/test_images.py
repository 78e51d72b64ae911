"""Samples as they are trained on: augmentation, padding, unreadable images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_images
from PIL import Image

from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.data.images import Images, collate, on_device
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


BROKEN = {
    "truncated": lambda good: good[: len(good) // 2],
    "empty": lambda good: b"",
    "html": lambda good: b"<html>404</html>",
    "vanished": None,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_unreadable_image_raises_or_becomes_padding(tmp_path: Path, kind: str) -> None:
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


def visited(images: Images, epoch: int, index: list[int]) -> torch.Tensor:
    """The network's input for these samples, float32 [B, C, H, W]."""
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


def test_pixels_are_between_minus_one_and_one(pictures: Path) -> None:
    images = source(pictures).train
    batch = on_device(next(iter(images.batches(range(9), 9))), torch.device("cpu"))
    assert batch.image.dtype == torch.float32 and batch.image.min() == -1 and batch.image.max() <= 1


def test_a_random_crop_is_cut_from_the_whole_image(tmp_path: Path) -> None:
    """Not from its center crop; validation images are center-cropped."""
    halves = np.zeros((40, 120), dtype=np.uint8)
    halves[:, 60:] = 240  # outside of the middle 40 x 40 there is only black or only white
    for number in range(4):
        save(tmp_path, f"{number}.png", Image.fromarray(halves))
    images = source(tmp_path, size=16, crop=0.02).train
    seen = [images[epoch, 0].image for epoch in range(30)]
    assert all(image.shape == (1, 16, 16) for image in seen)
    assert {0, 240} <= {int(image.float().mean()) for image in seen}, "some crops lie wholly on one side"
    assert 100 < images[None, 0].image.float().mean() < 140


def test_padding_is_read_like_its_sample(pictures: Path) -> None:
    images = source(pictures).train
    for _ in range(2):  # decoded, then cached
        batch, problems = images.__getitems__([(0, 3), (0, ~3)])
        assert batch.index.tolist() == [3, ~3] and torch.equal(batch.image[0], batch.image[1]) and not problems


def test_rows_that_can_not_be_read_together_are_read_one_by_one(pictures: Path) -> None:
    images = source(pictures).train
    table, images.cache = images.table, None

    class Table:
        def __getitem__(self, key: int | list[int]) -> object:
            if isinstance(key, list) and 5 in key:
                raise OSError("a damaged block")
            return table[key]

    keys = [(0, index) for index in range(40)]
    expected, images.table = images.__getitems__(keys), Table()  # type: ignore[assignment]
    found = images.__getitems__(keys)
    assert all(torch.equal(one, other) for one, other in zip(expected[0], found[0], strict=True)) and found[1] == []
