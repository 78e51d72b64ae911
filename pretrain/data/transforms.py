"""Random crops and flips of a whole batch, by random numbers of (seed, epoch, index).

A bicubic filter is linear and separable, so a crop is resized by two matrix products, one for the rows and one for the
columns.
"""

import math

import torch
from torch import Tensor

from pretrain.core.rng import SampleRNG

CROPS, FLIPS = 1, 2  # added to the key (seed, epoch) of random numbers; noise and masks use the key itself
ATTEMPTS = 10  # boxes drawn per crop; the first that fits is used
ASPECT_RATIOS = (3 / 4, 4 / 3)  # of a crop: width / height


def random_boxes(rng: SampleRNG, height: int, width: int, min_area: float) -> Tensor:
    """Draw a box to crop for each sample, with the distribution of torchvision's `RandomResizedCrop`.

    Its share of the area is uniform in [min_area, 1], its aspect ratio log-uniform (Szegedy et al., 2015, section 6).
    If no box in `ATTEMPTS` fits into the image, it is the largest centered box of an allowed aspect ratio.

    Args:
        rng: of the B samples.
        height, width: of the images, in pixels.
        min_area: smallest share of the image's area, in (0, 1].

    Returns:
        int64 [B, 4]: top, left, height and width in pixels.
    """
    drawn = rng.uniform(ATTEMPTS, 2).double()
    position = rng.uniform(2).double()
    area = height * width * (min_area + (1 - min_area) * drawn[..., 0])
    low, high = map(math.log, ASPECT_RATIOS)
    ratio = (low + (high - low) * drawn[..., 1]).exp()
    box_width, box_height = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()  # [B, ATTEMPTS]
    fits = (box_width > 0) & (box_width <= width) & (box_height > 0) & (box_height <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    central_ratio = min(max(width / height, ASPECT_RATIOS[0]), ASPECT_RATIOS[1])
    central = (min(height, round(width / central_ratio)), min(width, round(height * central_ratio)))
    none = ~fits.any(dim=1)
    box_height = box_height.gather(1, first).squeeze(1).masked_fill(none, central[0])
    box_width = box_width.gather(1, first).squeeze(1).masked_fill(none, central[1])
    top = torch.where(none, (height - box_height) // 2, (position[:, 0] * (height - box_height + 1)).long())
    left = torch.where(none, (width - box_width) // 2, (position[:, 1] * (width - box_width + 1)).long())
    return torch.stack([top, left, box_height, box_width], dim=1)


def resized_crops(image: Tensor, box: Tensor) -> Tensor:
    """Crop each image to its box, and resize the crop to the image's size by an antialiased bicubic filter.

    The filter is that of Keys (1981) with a = -0.5, as in Pillow and torchvision.

    Args:
        image: float32 [B, C, H, W] in [-1, 1].
        box: int64 [B, 4], see `random_boxes`.

    Returns:
        float32 [B, C, H, W], clamped to [-1, 1], where the filter overshoots.
    """
    top, left, box_height, box_width = box.unbind(1)
    rows = _filter(top, box_height, image.shape[2])
    columns = _filter(left, box_width, image.shape[3])
    return (rows[:, None] @ image @ columns[:, None].mT).clamp(-1, 1)


def _filter(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Matrices [B, size, size] that resize an interval of an axis to the whole axis.

    Entry (i, j) is the weight of the old pixel j in the new pixel i. Pixels outside of the interval have weight 0, and
    each row sums to 1.

    Args:
        start, length: int64 [B]; the interval, in pixels.
        size: of the axis, in pixels.
    """
    pixel = torch.arange(size, device=start.device)
    scale = (length / size)[:, None, None]
    center = (pixel[:, None] + 0.5) * scale + start[:, None, None]
    x = ((pixel + 0.5 - center) / scale.clamp(min=1)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
    weight = weight * inside[:, None]
    return weight / weight.sum(dim=-1, keepdim=True)


def random_flips(image: Tensor, rng: SampleRNG) -> Tensor:
    """Images [B, C, H, W], each mirrored left to right with probability 1/2."""
    return torch.where((rng.uniform() < 0.5)[:, None, None, None], image.flip(-1), image)
