"""A data set that fits is read once, before the training, and kept on the device that trains."""

import time
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler

from pretrain.data.image_cache import keep
from pretrain.data.images import Images
from pretrain.data.loader import RestartingLoader, make_loader

BATCH = 256  # images that a worker hands over at once
MANY = 20_000  # images whose reading takes long enough to be announced


class _Once(Sampler[tuple[None, int]]):
    """Everybody, as they are; those that are done left out."""

    def __init__(self, count: int) -> None:
        self.count, self.done = count, 0

    def __iter__(self) -> Iterator[tuple[None, int]]:
        return ((None, number) for number in range(self.done, self.count))


def preload(
    images: Images, device: torch.device, tell: Callable[[str], None], stopped: Callable[[], bool] = lambda: False
) -> float:
    """Read all images, by the loader's workers, and keep them in the device's memory, or in the CPU's if they fit.

    Args:
        images: whose visits are read from what is kept from now on; where nothing fits they stay as they are.
        device: that trains.
        tell: called with what the user should know.
        stopped: whether somebody told the program to stop; then nothing more is read, and visits are read as they come.

    Returns:
        The seconds that it took.

    Raises:
        UserError: an image can't be read, and such are not to be skipped.
    """
    began, host = time.monotonic(), images.kept
    kept = host if device.type == "cpu" or not images.keepable else keep(len(images), images.shape, device) or host
    if kept is None:
        return 0.0
    if len(images) >= MANY:
        tell(f"reading {len(images):,} images once; they are kept in the memory of {kept.image.device}")
    images.kept = None  # by nobody else meanwhile
    sampler = _Once(len(images))
    with RestartingLoader(lambda: make_loader(images, sampler, BATCH), tell) as batches:
        for batch, problems in batches:
            sampler.done += len(batch.index)
            images.settle(problems)
            good = batch.index >= 0
            kept.put(batch.index[good], batch.image[good], batch.label[good])
            if stopped():
                break
    kept.whole = sampler.done == len(images)
    images.kept = kept if kept.whole else host
    return time.monotonic() - began
