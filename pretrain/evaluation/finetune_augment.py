"""RandAugment and random erasing of timm, with random numbers that depend on the sample."""

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
    """RandAugment (Cubuk et al. 2020), then random erasing (Zhong et al. 2020), as in table 9 of He et al. 2022.

    Args:
        channels: of the images; RandAugment is omitted unless they are grey or RGB.
    """

    def __init__(self, channels: int) -> None:
        settings = {
            "img_mean": 128 if channels == 1 else (128, 128, 128),  # fills what lies outside of the image
            "magnitude_max": 9.999,  # at 10, posterize keeps 0 bits, which Pillow refuses
        }
        self.rand_augment = rand_augment_transform("rand-m9-mstd0.5-inc1", settings) if channels in (1, 3) else None
        self.erase = RandomErasing(0.25, mode="pixel", device="cpu")

    def __call__(self, images: Tensor, index: Tensor, *key: int) -> Tensor:
        """Augment each image with the random numbers of (*key, index).

        Args:
            images: float32 [B, C, H, W] in [-1, 1].
            index: int64 [B].
            key: for example the seed and the epoch.

        Returns:
            Images of the same shape, in [-1, 1] except for erased areas, which are standard normal noise.
        """
        augmented = [self._one(image, *key, n) for image, n in zip(images.cpu(), index.tolist(), strict=True)]
        return torch.stack(augmented).to(images.device)

    def _one(self, image: Tensor, *key: int) -> Tensor:
        with seeded(*key):
            if self.rand_augment is not None:
                picture = functional.to_pil_image(((image + 1) * 127.5).round().byte())
                image = functional.pil_to_tensor(self.rand_augment(picture)).float() / 127.5 - 1
            return self.erase(image.clone())  # it works in place


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch, which timm uses, and restore them at the end."""
    seed, python_state, numpy_state = fold_seed(*key), random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        random.setstate(random.Random(seed).getstate())
        np.random.set_state(np.random.RandomState(seed % 2**32).get_state())  # noqa: NPY002
        torch.random.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
