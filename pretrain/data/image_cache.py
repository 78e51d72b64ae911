"""Images of a small data set, decoded once and kept where they are trained on."""

import math
import os
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

MOST = 4 * 1024**3  # bytes of images in the memory of a process


class ImageCache:
    """Decoded images and their labels by number. A copy that is pickled, for workers that are spawned, is None.

    Args:
        count: N, images.
        shape: (C, H, W) of each.
        device: whose memory they are in; the CPU's takes room only as it is written to.

    Attributes:
        there: bool [N], on the CPU; which of them were put.
        whole: whether all were tried: those that are missing can't be read, and no worker is needed.
    """

    def __init__(self, count: int, shape: tuple[int, int, int], device: torch.device) -> None:
        if device.type == "cpu":
            self.image = torch.from_numpy(np.zeros((count, *shape), np.uint8))
        else:
            self.image = torch.zeros(count, *shape, dtype=torch.uint8, device=device)
        self.label = torch.full((count,), -1, device=device)
        self.there = torch.zeros(count, dtype=torch.bool)
        self.whole = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def put(self, number: Tensor, image: Tensor, label: Tensor) -> None:
        """Keep images, uint8 [B, C, H, W], and labels, int64 [B], as `number`, int64 [B] on the CPU."""
        at = number.to(self.image.device)
        self.image[at], self.label[at] = image.to(at.device), label.to(at.device)
        self.there[number] = True

    def take(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels, where they are kept; a missing one is black, of label -1. Waits for no device."""
        at = (number.pin_memory() if self.image.is_cuda else number).to(self.image.device, non_blocking=True)
        return self.image[at], self.label[at]


def keep(count: int, shape: tuple[int, int, int], device: torch.device) -> ImageCache | None:
    """Room for so many images; None where there is none.

    They may take a tenth of what is free of an accelerator's memory, which holds no activations yet; of the CPU's a
    quarter, shared by the processes of a launch, and at most `MOST`.
    """
    size = count * math.prod(shape)
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] // 10
    elif device.type == "cpu":
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        room = min(MOST, free // 4)
    else:
        room = 0
    return ImageCache(count, shape, device) if 0 < size <= room else None
