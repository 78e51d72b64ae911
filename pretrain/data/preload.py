"""Reading a data set that fits into memory once, before training, into the device that trains."""

import time
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler

from pretrain.data.image_cache import new_cache
from pretrain.data.images import Images
from pretrain.data.loader import RestartingLoader, make_loader

BATCH = 256  # images that a worker returns at once
MIN_LOGGED = 20_000  # images; reading fewer is not logged


class _Remaining(Sampler[tuple[None, int]]):
    """All samples in their order, without augmentation, from the first one that was not read yet."""

    def __init__(self, count: int) -> None:
        self.count, self.done = count, 0

    def __iter__(self) -> Iterator[tuple[None, int]]:
        return ((None, sample) for sample in range(self.done, self.count))


def preload(
    images: Images, device: torch.device, log: Callable[[str], None], stopped: Callable[[], bool] = lambda: False
) -> float:
    """Read all images by the loader's workers into the device's memory, or the CPU's, if they fit.

    Args:
        images: gets a complete cache; unchanged if the images fit nowhere.
        device: that trains.
        log: called with messages for the user.
        stopped: whether the program was asked to stop; then the rest is not read.

    Returns:
        The seconds that it took.

    Raises:
        UserError: an image can't be read and `on_bad_image` is "stop".
    """
    began, host = time.monotonic(), images.cache
    cache = host
    if device.type != "cpu" and images.cacheable:
        cache = new_cache(len(images), images.shape, device) or host
    if cache is None:
        return 0.0
    if len(images) >= MIN_LOGGED:
        log(f"reading {len(images):,} images once, into the memory of {cache.image.device}")
    images.cache = None  # so that nothing else fills it meanwhile
    sampler = _Remaining(len(images))
    with RestartingLoader(lambda: make_loader(images, sampler, BATCH), log) as batches:
        for batch, problems in batches:
            sampler.done += len(batch.index)
            images.handle(problems)
            readable = batch.without_padding()
            cache.put(readable.index, readable.image, readable.label)
            if stopped():
                break
    cache.complete = sampler.done == len(images)
    images.cache = cache if cache.complete else host
    return time.monotonic() - began
