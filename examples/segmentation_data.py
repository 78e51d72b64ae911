"""Images with masks: two folders, ADE20K, or made from Fashion-MNIST. Both are cropped and flipped alike."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from segmentation_files import check, find_pairs, read_mask
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize, resized_crop

from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.core.files import expand
from pretrain.core.rng import SampleRNG, generator
from pretrain.data.decode import decode
from pretrain.data.images import Images
from pretrain.data.sources import open_data
from pretrain.data.transforms import CROPS, FLIPS, random_boxes

ADE20K_PARTS = ("training", "validation")
THRESHOLD = -0.5  # of the masks that are made: brightness in [-1, 1] above which a pixel has the class of its image


@dataclass(frozen=True)
class Pairs:
    """Images with masks, and how they are read.

    Attributes:
        images: folder of images; default: Fashion-MNIST, with masks made by a threshold.
        masks: folder of their masks, PNG files of the same names whose pixels are class numbers; 255 is ignored.
        ade20k: the folder ADEChallengeData2016 instead of both: its 150 classes; "other" is ignored.
        size: side in pixels that images are resized to; default: 512, or 28 of Fashion-MNIST.
        flip: mirror each image with its mask left to right with probability 1/2.
        crop: smallest area of a random crop, as a share of the image's; 1: no random crop.
        held_out: share of the pairs that is held out for evaluation, where there is no split for it.
        limit: largest number of training pairs, a random subset; default: all.
        workers: processes that read images beside the training process.
    """

    images: str | None = None
    masks: str | None = None
    ade20k: str | None = None
    size: int | None = None
    flip: bool = False
    crop: float = 1.0
    held_out: float = 0.1
    limit: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        if (self.images is None) != (self.masks is None) or (self.images and self.ade20k):
            raise UserError("--images, --masks and --ade20k: give both of the first two, or the third alone")
        for name, valid in {
            "size": self.size is None or self.size >= 1,
            "crop": 0 < self.crop <= 1,
            "held-out": 0 < self.held_out < 1,
            "limit": self.limit is None or self.limit >= 1,
            "workers": self.workers >= 0,
        }.items():
            if not valid:
                allowed = {"crop": "above 0 and at most 1", "held-out": "above 0 and below 1", "workers": "0 or more"}
                value = getattr(self, name.replace("-", "_"))
                raise UserError(f"--{name} must be {allowed.get(name, 'at least 1')}, got {value}")


class Files(NamedTuple):
    """Pairs of an image file and its mask's; called with i it reads the i-th."""

    pairs: Sequence[tuple[Path, Path]]
    ade20k: bool

    def __call__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image, uint8 [3, H, W], and mask, int32 [H, W].

        Raises:
            UserError: one of them can't be read.
        """
        image, mask = self.pairs[index]
        try:
            pixels = decode({"bytes": image.read_bytes(), "path": None}, 3, None)
        except Exception as error:  # image decoders raise exceptions of any type
            raise UserError(f"{image} can't be read: {error}; repair it, or remove it and its mask") from None
        return pixels, torch.from_numpy(read_mask(mask, self.ade20k))


class Made(NamedTuple):
    """Images whose masks show their label where they are bright, and `background` elsewhere."""

    image: Tensor  # uint8 [N, C, H, W]
    label: Tensor  # int64 [N]
    background: int

    def __call__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image, uint8 [C, H, W], and mask, int64 [H, W]."""
        image = self.image[index]
        return image, self.label[index].where(image.float().mean(dim=0) / 127.5 - 1 > THRESHOLD, self.background)


class Pictures(Dataset[Any]):
    """Images with masks, by (epoch, index); epoch None: the whole image, and the mask in its own size.

    Args:
        read: returns image i, uint8 [C, H, W], and its mask, an integer tensor [H, W].
        count: N, the number of images.
        size: side in pixels that images are resized to.
        data: crop, flip and workers.
        seed: of crops and flips, which are functions of (seed, epoch, index).
    """

    def __init__(self, read: Files | Made, count: int, size: int, data: Pairs, seed: int) -> None:
        self.read, self.count, self.size, self.data, self.seed = read, count, size, data, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int | None, int]) -> tuple[Tensor, Tensor, int] | UserError:
        """Image, uint8 [C, size, size], mask, int64, and index; or an error, for `batches` to raise."""
        epoch, index = key
        try:
            image, mask = self.read(index)
        except UserError as error:
            return error
        size = [self.size, self.size]
        if epoch is None:
            return resize(image, size, InterpolationMode.BILINEAR), mask.long(), index
        (height, width), at = mask.shape, torch.tensor([index])
        top, left = 0, 0
        if self.data.crop < 1:
            rng = SampleRNG(self.seed, epoch, CROPS, index=at)
            top, left, height, width = random_boxes(rng, height, width, self.data.crop)[0].tolist()
        image = resized_crop(image, top, left, height, width, size, InterpolationMode.BILINEAR)
        mask = resized_crop(mask[None], top, left, height, width, size, InterpolationMode.NEAREST_EXACT)[0]
        if self.data.flip and SampleRNG(self.seed, epoch, FLIPS, index=at).uniform() < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        return image, mask.long(), index

    def batches(self, keys: Any, size: int) -> Iterator[tuple[Tensor, list[Tensor], Tensor]]:
        """Images, float32 [B, C, H, W] in [-1, 1], masks and indices of keys (epoch, index), `size` at a time.

        Raises:
            UserError: an image can't be read.
        """
        settings: Any = {"num_workers": self.data.workers, "collate_fn": list, "generator": torch.Generator()}
        for items in DataLoader(self, size, sampler=keys, **settings):
            for item in items:
                if isinstance(item, UserError):
                    raise item
            image, mask, index = zip(*items, strict=True)
            yield torch.stack(image).float() / 127.5 - 1, [*mask], torch.tensor(index)


class Opened(NamedTuple):
    """What is trained and evaluated on."""

    train: Pictures
    test: Pictures
    channels: int
    classes: int


def open_pairs(data: Pairs, seed: int) -> Opened:
    """Open what the settings name, and print what was found.

    Raises:
        UserError: images or masks are missing or can't be used.
    """
    if data.ade20k is not None:
        root = expand(data.ade20k)
        train, test = (find_pairs(root / "images" / part, root / "annotations" / part) for part in ADE20K_PARTS)
    elif data.images is not None and data.masks is not None:
        train, test = _split(find_pairs(expand(data.images), expand(data.masks)), data.held_out, seed)
    else:
        source = open_data(Data(limit=data.limit), seed)
        channels, size = source.shape[0], data.size or source.shape[1]
        train, test = (Pictures(_made(images, source.classes), len(images), size, data, seed) for images in source[:2])
        return Opened(train, test, channels, source.classes + 1)
    if data.limit is not None and data.limit < len(train):
        train, _ = _split(train, 1 - data.limit / len(train), seed)
    ade20k = data.ade20k is not None
    classes = check([*train, *test], ade20k)
    print(f"{len(train):,} images to train on, {len(test):,} to evaluate on; {classes} classes")
    train, test = (Pictures(Files(pairs, ade20k), len(pairs), data.size or 512, data, seed) for pairs in (train, test))
    return Opened(train, test, 3, classes)


def _made(images: Images, background: int) -> Made:
    batch = next(iter(images.batches(range(len(images)), len(images))))
    return Made(batch.image, batch.label, background)


def _split(pairs: list[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Two parts in their order; the second, of uniformly drawn pairs, has that share, and neither is empty.

    Raises:
        UserError: there is only one pair.
    """
    if len(pairs) < 2:
        raise UserError(f"{pairs[0][0]} is the only image with a mask; give at least two, to train and to evaluate")
    count = min(max(1, round(share * len(pairs))), len(pairs) - 1)
    order = torch.randperm(len(pairs), generator=generator(seed)).tolist()
    first, second = ([pairs[i] for i in sorted(part)] for part in (order[count:], order[:count]))
    return first, second
