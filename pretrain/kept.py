"""Images of a small data set, decoded once."""

import math
import mmap
import os
from typing import Any

import psutil
import torch
from torch import Tensor

MOST = 4 * 1024**3  # bytes of images in a process; of larger data sets every visit decodes


class Kept:
    """Decoded images and their labels by number, filled as they are visited.

    Processes that are forked afterwards, such as a loader's workers, share the memory: what one has decoded, none
    decodes again. A copy that is pickled, for workers that are spawned, is None: theirs would be one each.

    Args:
        count: N, images.
        shape: (C, H, W) of each.
    """

    def __init__(self, count: int, shape: tuple[int, int, int]) -> None:
        # Anonymous memory: /dev/shm may be small. It takes room only as it is written to.
        size = math.prod(shape)
        self.image = torch.frombuffer(mmap.mmap(-1, count * size), dtype=torch.uint8).view(count, *shape)
        self.label = torch.frombuffer(mmap.mmap(-1, count * 8), dtype=torch.int64)
        self.there = mmap.mmap(-1, count)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def get(self, number: int) -> tuple[Tensor, int] | None:
        """The image, uint8 [C, H, W], not to be changed, and its label; None where it was not yet decoded."""
        return (self.image[number], int(self.label[number])) if self.there[number] else None

    def put(self, number: int, image: Tensor, label: int) -> None:
        """Keep an image; who is killed meanwhile leaves it as not yet decoded."""
        self.image[number], self.label[number] = image, label
        self.there[number] = 1


def keep(count: int, shape: tuple[int, int, int]) -> Kept | None:
    """Room for so many images, where they take at most `MOST` and, of the memory that is free, a process's quarter."""
    free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Kept(count, shape) if 0 < count * math.prod(shape) <= min(MOST, free // 4) else None
