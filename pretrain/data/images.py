"""Images by index: read, batched, augmented.

A sample's index never changes, and its augmentation is a function of (seed, epoch, index). An image that can't be read
keeps its index, too: it becomes padding in its batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms.v2 import InterpolationMode, functional

from pretrain.adapters import Batch
from pretrain.config.schema import Data
from pretrain.core.errors import UserError, limit_reached
from pretrain.core.padding import sample_of
from pretrain.core.rng import SampleRNG
from pretrain.core.text import printable
from pretrain.data.decode import Reading, decode, path_of
from pretrain.data.files import from_text
from pretrain.data.image_cache import new_cache
from pretrain.data.transforms import CROPS, FLIPS, random_boxes, random_flips, resized_crops

ROWS = 16  # of the table that are read at once; a limit, as rows can hold whole files
MAX_SKIPPED = 0.5  # share of the images; if more can't be used, the training stops


class Item(NamedTuple):
    """One sample, as a loader worker returns it."""

    image: Tensor  # uint8 [C, H, W], or float32 latents
    label: int
    index: int  # padding if the image can't be read
    problem: str  # why it can't, or ""


class Images(Dataset[Item]):
    """Labelled images of one shape, by (epoch, index).

    Args:
        table: rows with "image", {"bytes", "path"}, a place in a tar file (`pretrain.data.tars.FEATURES`), an array or
            None, and "label", -1 where there is none.
        rows: int64 [N]; the table's row of each sample.
        shape: (C, H, W) of every image.
        data: size, crop and further settings.
        seed: of the augmentation.
        name: of the table, for messages about a row.
        reading: how images are decoded.

    Attributes:
        skipped: descriptions of the images that were skipped so far.
        cache: where decoded images are stored after their first use; None: they are decoded every time.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        rows: np.ndarray,
        shape: tuple[int, int, int],
        data: Data,
        seed: int,
        name: str,
        reading: Reading = Reading(),  # noqa: B008 — it can't be changed
    ) -> None:
        self.table, self.rows, self.shape, self.data, self.seed, self.name = table, rows, shape, data, seed, name
        self.reading = reading
        self.skipped: set[str] = set()
        self.cache = new_cache(len(rows), shape, torch.device("cpu")) if self.cacheable else None

    @property
    def crops_when_decoding(self) -> bool:
        """Whether random crops are taken from the full-size image, before it is brought to its size."""
        return self.data.crop < 1 and self.data.size is not None

    @property
    def cacheable(self) -> bool:
        """Whether the decoded image is the same in every epoch."""
        return not self.crops_when_decoding

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int | None, int]) -> Item:
        """The sample of (epoch, index), cropped for that epoch if `crops_when_decoding`; epoch None: not augmented."""
        return self._item(key, None)

    def _items(self, keys: Sequence[tuple[int | None, int]]) -> list[Item]:
        """Items of several keys; rows are read `ROWS` at a time, which takes a fifth of the time of one by one."""
        items = []
        for start in range(0, len(keys), ROWS):
            some = keys[start : start + ROWS]
            try:
                columns = self.table[self.rows[[sample_of(index) for _, index in some]].tolist()]
                rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            except Exception:  # of one of them; they are read one by one, to find which
                rows = [None] * len(some)
            items += map(self._item, some, rows)
        return items

    def _item(self, key: tuple[int | None, int], row: dict[str, Any] | None) -> Item:
        """The sample of (epoch, index) from its row; None: the row is read."""
        epoch, index = key
        sample = sample_of(index)
        try:
            image, label = self._decode(self.table[int(self.rows[sample])] if row is None else row, sample, epoch)
        except Exception as error:  # image decoders raise exceptions of any type
            if limit_reached(error):  # not the image's fault
                raise
            problem = printable(f"{self.name_of(sample)} can't be used: {' '.join(str(error).split())}")
            return Item(torch.zeros(self.shape, dtype=torch.uint8), -1, ~sample, problem)
        return Item(image, label, index, "")

    def __getitems__(self, keys: Sequence[tuple[int | None, int]]) -> tuple[Batch, list[str]]:
        """The samples as a batch, and a message for each that can't be read; cached images are not decoded again."""
        cache = self.cache
        if cache is None or (get_worker_info() and not cache.complete):  # a worker's cache is lost with its process
            return collate(self._items(keys))
        index = torch.tensor([index for _, index in keys])
        sample = sample_of(index)
        problems = []
        missing = ~cache.present[sample]
        if cache.complete:
            return Batch(*cache.get(sample), torch.where(missing, ~sample, index), torch.zeros(len(index))), []
        absent = missing.nonzero().flatten().tolist()
        for position, item in zip(absent, self._items([keys[position] for position in absent]), strict=True):
            if item.problem:
                problems.append(item.problem)
                index[position] = item.index
            else:
                cache.put(sample[position], item.image, torch.tensor(item.label))
        return Batch(*cache.get(sample), index, torch.zeros(len(index))), problems

    def augmented(self, batch: Batch, epoch: int) -> Batch:
        """A batch of `on_device`, cropped and flipped for `epoch` by random numbers of (seed, epoch, index)."""
        image = batch.image
        if self.data.crop < 1 and not self.crops_when_decoding:
            rng = SampleRNG(self.seed, epoch, CROPS, index=batch.index)
            image = resized_crops(image, random_boxes(rng, *self.shape[1:], self.data.crop))
        if self.data.flip:
            image = random_flips(image, SampleRNG(self.seed, epoch, FLIPS, index=batch.index))
        return batch._replace(image=image)

    def _decode(self, row: dict[str, Any], sample: int, epoch: int | None) -> tuple[Tensor, int]:
        """The image, uint8 [C, H, W], and its label."""
        if epoch is None or not self.crops_when_decoding:
            image = decode(row["image"], self.shape[0], self.data.size, self.reading)
        else:
            image = decode(row["image"], self.shape[0], None, self.reading)
            rng = SampleRNG(self.seed, epoch, CROPS, index=torch.tensor([sample]))
            box = random_boxes(rng, image.shape[1], image.shape[2], self.data.crop)[0].tolist()
            image = functional.resized_crop(
                image, *box, size=[*self.shape[1:]], interpolation=InterpolationMode.BICUBIC
            )
        if image.shape != self.shape:
            raise ValueError(
                f"it is {image.shape[2]}x{image.shape[1]} where most images are {self.shape[2]}x{self.shape[1]}"
                "; resize all with --data.size N"
            )
        return image, int(row["label"])

    def name_of(self, index: int) -> str:
        """The sample's path, or its row in the table, for a terminal."""
        row = int(self.rows[index])
        image = self.table[row]["image"]
        path = image["path"] if isinstance(image, dict) else None
        return printable(from_text(path) if path else f"row {row} of {self.name}")

    def file_of(self, path: str) -> str | None:
        """The file of a row's path; None if it may not be read."""
        try:
            return path_of(path, self.reading.folders)
        except ValueError:
            return None

    def handle(self, problems: Iterable[str]) -> None:
        """Apply `on_bad_image` to images that can't be read: stop, or record them as skipped.

        Raises:
            UserError: with `on_bad_image` "stop", or if more than `MAX_SKIPPED` of the images were skipped.
        """
        for problem in problems:
            if self.data.on_bad_image == "stop":
                raise UserError(
                    f"{problem}; repair or remove it, or skip such images with --on-bad-image skip", local=True
                )
            self.skipped.add(problem)
            if len(self.skipped) > MAX_SKIPPED * len(self):
                raise UserError(
                    f"{len(self.skipped)} of the {len(self)} images can't be used, more than {MAX_SKIPPED:.0%}; for "
                    f"example, {problem}; bring them back and --resume",
                    local=True,
                )

    def batches(self, index: Sequence[int], size: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The samples `index` without augmentation, in batches (uint8) of `size`, without those that can't be read.

        Of `world` processes, the one of this rank gets every world-th batch.
        """
        for start in range(rank * size, len(index), world * size):
            batch, problems = self.__getitems__([(None, int(sample)) for sample in index[start : start + size]])
            self.handle(problems)
            readable = batch.without_padding()
            if len(readable.index):
                yield readable


def collate(items: list[Item]) -> tuple[Batch, list[str]]:
    """Items as a batch (images uint8, level 0 for the loop to fill in), and the problems of those that have one."""
    index = torch.tensor([item.index for item in items])
    label = torch.tensor([item.label for item in items])
    batch = Batch(torch.stack([item.image for item in items]), label, index, torch.zeros(len(items)))
    return batch, [item.problem for item in items if item.problem]


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, images as float32 in [-1, 1]; latents are only moved."""
    moved = Batch(*(field.to(device, non_blocking=True) for field in batch))
    return moved if moved.image.is_floating_point() else moved._replace(image=moved.image.float() / 127.5 - 1)
