"""A data set that fits is read once, before the training, and kept on the device that trains."""

from collections.abc import Callable

import torch

from pretrain.data import Images, loader
from pretrain.kept import keep
from pretrain.patient import Patient

BATCH = 256  # images that a worker hands over at once
MANY = 20_000  # images whose reading takes long enough to be announced


def preload(images: Images, device: torch.device, tell: Callable[[str], None]) -> None:
    """Read all images, by the loader's workers, and keep them in the device's memory, or in the CPU's if they fit.

    Args:
        images: whose visits are read from what is kept from now on; where nothing fits they stay as they are.
        device: that trains.
        tell: called with what the user should know.

    Raises:
        Refused: an image can't be read, and such are not to be skipped.
    """
    kept = (keep(len(images), images.shape, device) or images.kept) if images.keepable else None
    if kept is None:
        return
    if len(images) >= MANY:
        tell(f"reading {len(images):,} images once; they are kept in the memory of {device}")
    left = [(None, number) for number in range(len(images))]
    with Patient(lambda: loader(images, left[:], BATCH), tell) as batches:
        for batch, problems in batches:
            del left[: len(batch.index)]
            images.settle(problems)
            good = batch.index >= 0
            kept.put(batch.index[good], batch.image[good], batch.label[good])
    kept.whole, images.kept = True, kept
