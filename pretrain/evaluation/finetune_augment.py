"""Random changes of images in fine-tuning, by timm; what is drawn belongs to the sample."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms.v2 import functional

from pretrain.core.rng import fold_seed


class Augmentation:
    """RandAugment (Cubuk et al. 2020), then random erasing (Zhong et al. 2020), as He et al. 2022 have them in table 9.

    Args:
        channels: of the images; RandAugment is left out where they are neither grey nor RGB.
    """

    def __init__(self, channels: int) -> None:
        settings = {
            "img_mean": 128 if channels == 1 else (128, 128, 128),  # what comes in from beyond an edge
            "magnitude_max": 9.999,  # at 10 posterising keeps no bit at all, which Pillow refuses
        }
        self.change = rand_augment_transform("rand-m9-mstd0.5-inc1", settings) if channels in (1, 3) else None
        self.erase = RandomErasing(0.25, mode="pixel", device="cpu")

    def __call__(self, images: Tensor, index: Tensor, *clock: int) -> Tensor:
        """Images, float32 [B, C, H, W] in [-1, 1], each changed by what (clock, index) draws; noise where erased."""
        changed = [self._one(image, *clock, n) for image, n in zip(images.cpu(), index.tolist(), strict=True)]
        return torch.stack(changed).to(images.device)

    def _one(self, image: Tensor, *clock: int) -> Tensor:
        with seeded(*clock):
            if self.change is not None:
                picture = functional.to_pil_image(((image + 1) * 127.5).round().byte())
                image = functional.pil_to_tensor(self.change(picture)).float() / 127.5 - 1
            return self.erase(image.clone())  # it erases in place


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Timm draws from the global generators, of Python, numpy and torch; they are put back as they were."""
    seed, before, numpys = fold_seed(*parts), random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        random.setstate(random.Random(seed).getstate())
        np.random.set_state(np.random.RandomState(seed % 2**32).get_state())  # noqa: NPY002
        torch.random.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(numpys)  # noqa: NPY002
