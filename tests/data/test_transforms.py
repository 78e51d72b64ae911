"""Crops and flips of whole batches: the pixels and distribution of torchvision's, with random numbers per sample."""

import random

import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop, functional

from pretrain.core.rng import SampleRNG
from pretrain.data.transforms import CROPS, FLIPS, random_boxes, random_flips, resized_crops

SHAPES = [(3, 32, 32), (1, 28, 20), (4, 9, 17), (1, 1, 5)]


def drawn(count: int, height: int, width: int, least: float, epoch: int = 0) -> torch.Tensor:
    return random_boxes(SampleRNG(0, epoch, CROPS, index=torch.arange(count)), height, width, least)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("least", [0.01, 0.3, 0.9])
def test_crops_are_torchvisions(shape: tuple[int, int, int], least: float) -> None:
    image = torch.rand(40, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    box = drawn(40, *shape[1:], least)
    box[0] = torch.tensor([0, 0, *shape[1:]])  # a box of the whole image
    made = resized_crops(image, box)
    for one, (top, left, tall, wide), found in zip(image, box.tolist(), made, strict=True):
        how = {"size": [*shape[1:]], "interpolation": InterpolationMode.BICUBIC, "antialias": True}
        expected = functional.resized_crop(one, top, left, tall, wide, **how).clamp(-1, 1)
        torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)
    torch.testing.assert_close(made[0], image[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("height", "width", "least"),
    [(32, 32, 0.2), (96, 64, 0.05), (30, 40, 0.8), (8, 40, 0.9), (40, 8, 0.9), (3, 3, 0.5)],
)
def test_the_boxes_are_distributed_like_torchvisions(height: int, width: int, least: float) -> None:
    """Also if no box fits. Of 6,000 boxes each, means and quartiles of every side agree within sampling error."""
    count = 6_000
    mine = drawn(count, height, width, least).double()
    assert (mine >= 0).all() and (mine[:, 2:] > 0).all()
    assert (mine[:, 0] + mine[:, 2] <= height).all() and (mine[:, 1] + mine[:, 3] <= width).all()
    crop, blank = RandomResizedCrop((height, width), scale=(least, 1.0)), torch.zeros(1, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = torch.tensor(
            [[found[side] for side in ("top", "left", "height", "width")]
             for found in (crop.make_params([blank]) for _ in range(count))]
        ).double()  # fmt: skip
    for one, other in zip(mine.T, theirs.T, strict=True):
        error = ((one.var() + other.var()) / count).sqrt().item()
        assert one.mean().item() == pytest.approx(other.mean().item(), abs=4.5 * error + 1e-9)
        for edge in other.unique()[:: max(1, len(other.unique()) // 4)]:
            share = (other <= edge).double().mean().item()
            error = (2 * share * (1 - share) / count) ** 0.5
            assert (one <= edge).double().mean().item() == pytest.approx(share, abs=4.5 * error + 1e-9)


def test_half_are_mirrored_independently_of_the_crop() -> None:
    image = torch.rand(4000, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    index = torch.arange(4000)
    made = random_flips(image, SampleRNG(0, 5, FLIPS, index=index))
    mirrored = (made == image.flip(-1)).all(dim=(1, 2, 3))
    assert (mirrored | (made == image).all(dim=(1, 2, 3))).all()
    assert mirrored.double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)
    box = drawn(4000, 32, 32, 0.2, epoch=5).double()
    for side in box.T:
        assert torch.corrcoef(torch.stack([side, mirrored.double()]))[0, 1].abs() < 4 / 4000**0.5
    again = random_flips(image, SampleRNG(0, 6, FLIPS, index=index))
    assert 0.4 < (made == again).all(dim=(1, 2, 3)).double().mean() < 0.6


def test_augmentation_is_per_sample() -> None:
    """Alone or in any batch, on any rank, as padding."""
    image = torch.rand(30, 3, 12, 10, generator=torch.Generator().manual_seed(2))
    index = torch.tensor(random.Random(0).sample(range(10**9), 30))

    def made(chosen: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        cropped = resized_crops(chosen, random_boxes(SampleRNG(3, 1, CROPS, index=index), 12, 10, 0.2))
        return random_flips(cropped, SampleRNG(3, 1, FLIPS, index=index))

    whole = made(image, index)
    for part in (torch.arange(30).flip(0), torch.arange(0, 30, 3), torch.tensor([7])):
        torch.testing.assert_close(made(image[part], index[part]), whole[part], atol=1e-6, rtol=0)
    assert torch.equal(made(image, ~index), whole)


def test_augmentation_does_not_synchronize_with_the_device() -> None:
    """On the meta device, where reading a value raises."""
    image, index = torch.zeros(5, 3, 8, 8, device="meta"), torch.arange(5, device="meta")
    box = random_boxes(SampleRNG(0, 0, CROPS, index=index), 8, 8, 0.2)
    assert random_flips(resized_crops(image, box), SampleRNG(0, 0, FLIPS, index=index)).shape == image.shape
