"""Random crops and flips, functions of (seed, epoch, index), drawn and made for a whole batch at once.

A crop is brought to the image's size by two matrix products, one for the rows and one for the columns: what a bicubic
filter makes of a box is linear in its pixels, and separable.
"""

import math

import torch
from torch import Tensor

from pretrain.core.rng import SampleRNG

CROPS, FLIPS = 1, 2  # streams of a visit's draws; that of noise and masks has no number
TRIES = 10  # boxes that are drawn for a crop, of which the first that fits is taken
RATIOS = (3 / 4, 4 / 3)  # of a crop's width to its height


def boxes(rng: SampleRNG, height: int, width: int, least: float) -> Tensor:
    """A box to crop for each sample, int64 [B, 4]: top, left, height, width.

    Its share of the area is uniform, its ratio of width to height log-uniform (Szegedy et al. 2015, section 6); where
    none of ten fits, it is the largest in the middle whose ratio is allowed. The distribution is that of torchvision's
    `RandomResizedCrop`.

    Args:
        rng: of the samples.
        height: of all images.
        width: likewise.
        least: smallest share of the area.
    """
    drawn = rng.uniform(TRIES, 2).double()
    place = rng.uniform(2).double()
    area = height * width * (least + (1 - least) * drawn[..., 0])
    low, high = map(math.log, RATIOS)
    ratio = (low + (high - low) * drawn[..., 1]).exp()
    wide, tall = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()  # [B, TRIES]
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    bound = min(max(width / height, RATIOS[0]), RATIOS[1])
    middle = (min(height, round(width / bound)), min(width, round(height * bound)))
    none = ~fits.any(dim=1)
    tall = tall.gather(1, first).squeeze(1).masked_fill(none, middle[0])
    wide = wide.gather(1, first).squeeze(1).masked_fill(none, middle[1])
    place = torch.where(none[:, None], 0.5, place)
    top = torch.where(none, (height - tall) // 2, (place[:, 0] * (height - tall + 1)).long())
    left = torch.where(none, (width - wide) // 2, (place[:, 1] * (width - wide + 1)).long())
    return torch.stack([top, left, tall, wide], dim=1)


def resized_crops(image: Tensor, box: Tensor) -> Tensor:
    """Each image's box at the size of the image, by an antialiased bicubic filter (Keys 1981, a = -0.5).

    Args:
        image: float32 [B, C, H, W] in [-1, 1].
        box: int64 [B, 4], see `boxes`.

    Returns:
        float32 [B, C, H, W] in [-1, 1]; where the filter overshoots it is cut off.
    """
    top, left, tall, wide = box.unbind(1)
    rows = _filter(top, tall, image.shape[2])
    columns = _filter(left, wide, image.shape[3])
    return (rows[:, None] @ image @ columns[:, None].mT).clamp(-1, 1)


def _filter(start: Tensor, length: Tensor, size: int) -> Tensor:
    """What each of `size` new pixels takes of each of `size` old ones, of those in the interval: [B, size, size]."""
    at = torch.arange(size, device=start.device)
    scale = (length / size)[:, None, None]
    centre = (at[:, None] + 0.5) * scale + start[:, None, None]
    x = ((at + 0.5 - centre) / scale.clamp(min=1)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    inside = (at >= start[:, None]) & (at < (start + length)[:, None])
    weight = weight * inside[:, None]
    return weight / weight.sum(dim=-1, keepdim=True)


def flipped(image: Tensor, rng: SampleRNG) -> Tensor:
    """Half of the images [B, C, H, W] mirrored left to right."""
    return torch.where((rng.uniform() < 0.5)[:, None, None, None], image.flip(-1), image)
