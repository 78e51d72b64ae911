"""Random patch masks of masked autoencoders."""

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.core.rng import SampleRNG


class Masks(NamedTuple):
    """The visible and the hidden patches of each image, in random order."""

    visible: Tensor  # int64 [B, V]; indices of patches
    hidden: Tensor  # int64 [B, H]
    valid: Tensor | None  # bool [B, V + H]; False for entries to ignore; None: all are valid


def random_masks(
    patches: int, mask_ratio: float, max_ratio: float | None, predict: float, level: Tensor, rng: SampleRNG
) -> Masks:
    """Draw visible and hidden patches uniformly, at least one of each (He et al., 2022, section 3).

    Args:
        patches: of an image, L.
        mask_ratio: share of the patches that is hidden at level 0, in (0, 1).
        max_ratio: share that is hidden at level 1; it is linear in the level. None: `mask_ratio` at every level.
        predict: H as a share of the patches that are hidden at level 1, in (0, 1].
        level: float32 [B], each in [0, 1).
        rng: of the B samples.

    Returns:
        V and H are the same for all images, the largest numbers that occur; with `max_ratio` `valid` marks the entries
        of each image.
    """
    order = rng.uniform(patches).argsort(dim=1)
    max_visible = min(max(round(patches * (1 - mask_ratio)), 1), patches - 1)
    min_visible = max_visible if max_ratio is None else min(max(round(patches * (1 - max_ratio)), 1), max_visible)
    predicted = max(round(predict * (patches - min_visible)), 1)  # the last in `order`, which are hidden first
    visible, hidden = order[:, :max_visible], order[:, -predicted:]
    if max_ratio is None:
        return Masks(visible, hidden, None)
    count = (patches * (1 - mask_ratio - level * (max_ratio - mask_ratio))).round()
    count = count.clamp(min_visible, max_visible)[:, None]  # of visible patches, [B, 1]
    position = torch.arange(patches, device=order.device)  # in `order`
    return Masks(visible, hidden, torch.cat([position[:max_visible] < count, position[-predicted:] >= count], dim=1))
