"""A cache of decoded images, for data sets that fit into memory."""

import math
import os
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

MAX_HOST_BYTES = 4 * 1024**3  # of images in the memory of a process


class ImageCache:
    """Decoded images and their labels by sample. Pickling gives None, so that spawned workers get no copy.

    Args:
        count: N, images.
        shape: (C, H, W) of each.
        device: that stores them; the CPU's memory is only used as images are written.

    Attributes:
        present: bool [N], on the CPU; which images are stored.
        complete: whether reading all images was tried: those that are not present can't be read.
    """

    def __init__(self, count: int, shape: tuple[int, int, int], device: torch.device) -> None:
        if device.type == "cpu":
            self.image = torch.from_numpy(np.zeros((count, *shape), np.uint8))
        else:
            self.image = torch.zeros(count, *shape, dtype=torch.uint8, device=device)
        self.label = torch.full((count,), -1, device=device)
        self.present = torch.zeros(count, dtype=torch.bool)
        self.complete = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def put(self, sample: Tensor, image: Tensor, label: Tensor) -> None:
        """Store images, uint8 [B, C, H, W], and labels, int64 [B], of samples, int64 [B] on the CPU."""
        at = sample.to(self.image.device)
        self.image[at], self.label[at] = image.to(at.device), label.to(at.device)
        self.present[sample] = True

    def get(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels on the cache's device, without synchronizing; an absent image is black, its label -1."""
        at = (sample.pin_memory() if self.image.is_cuda else sample).to(self.image.device, non_blocking=True)
        return self.image[at], self.label[at]


def new_cache(count: int, shape: tuple[int, int, int], device: torch.device) -> ImageCache | None:
    """A cache for `count` images, or None if they don't fit.

    They may use a tenth of an accelerator's free memory, which holds no activations yet; or a quarter of the available
    memory of the CPU, shared by the processes of a launch, and at most `MAX_HOST_BYTES`.
    """
    size = count * math.prod(shape)
    if device.type == "cuda":
        limit = torch.cuda.mem_get_info(device)[0] // 10
    elif device.type == "cpu":
        available = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        limit = min(MAX_HOST_BYTES, available // 4)
    else:
        limit = 0
    return ImageCache(count, shape, device) if 0 < size <= limit else None
