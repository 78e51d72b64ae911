"""Images by index: read, batched, augmented.

Every sample has a number that never moves, and what is done to it is a function of (seed, epoch, number).
An image that can't be read keeps its number too: its slot is marked as one that does not count.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms.v2 import InterpolationMode, functional

from pretrain.adapters import Batch
from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG
from pretrain.data.decode import decode
from pretrain.data.image_cache import keep
from pretrain.data.transforms import CROPS, FLIPS, boxes, flipped, resized_crops


class Item(NamedTuple):
    """One visit, as a worker hands it over."""

    image: Tensor  # uint8 [C, H, W], or float32 latents
    label: int
    index: int  # negative where the image can't be read
    problem: str  # why, or ""


class Images(Dataset[Item]):
    """Labelled images of one shape, by (epoch, index).

    Args:
        table: rows with "image", {"bytes", "path"}, and "label", -1 where there is none.
        rows: int64 [N]; the table's row of each sample.
        shape: (C, H, W) of every image.
        data: how they are read.
        seed: of the augmentation.
        name: what row numbers in messages are of.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        rows: np.ndarray,
        shape: tuple[int, int, int],
        data: Data,
        seed: int,
        name: str,
    ) -> None:
        self.table, self.rows, self.shape, self.data, self.seed, self.name = table, rows, shape, data, seed, name
        self.bad: set[str] = set()  # names of the images that were skipped
        self.cut = data.crop < 1 and data.size is not None  # crops are cut as images are read, which have any size
        self.keepable = not self.cut  # what a crop wants of such an image is not what an evaluation wants
        self.kept = keep(len(rows), shape, torch.device("cpu")) if self.keepable else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, visit: tuple[int | None, int]) -> Item:
        """The sample `index`, read for `epoch` (None: as it is); a negative index stays one."""
        epoch, index = visit
        number = ~index if index < 0 else index
        try:
            image, label = self._decoded(number, epoch)
        except Exception as error:  # image decoders raise whatever they like
            problem = f"{self.name_of(number)} can't be used: {' '.join(str(error).split())}"
            return Item(torch.zeros(self.shape, dtype=torch.uint8), -1, ~number, problem)
        return Item(image, label, index, "")

    def __getitems__(self, visits: Sequence[tuple[int | None, int]]) -> tuple[Batch, list[str]]:
        """The samples as a batch, and what is wrong with those that can't be read; what is kept is not read again."""
        kept = self.kept
        if kept is None or (get_worker_info() and not kept.whole):  # what a worker keeps is no use to the others
            return collate([self[visit] for visit in visits])
        index = torch.tensor([index for _, index in visits])
        number = torch.where(index < 0, ~index, index)
        problems = []
        missing = ~kept.there[number]
        if kept.whole:
            return Batch(*kept.take(number), torch.where(missing, ~number, index), torch.zeros(len(index))), []
        for position in missing.nonzero().flatten().tolist():
            item = self[visits[position]]
            if item.problem:
                problems.append(item.problem)
                index[position] = item.index
            else:
                kept.put(number[position], item.image, torch.tensor(item.label))
        return Batch(*kept.take(number), index, torch.zeros(len(index))), problems

    def augmented(self, batch: Batch, epoch: int) -> Batch:
        """A batch as `on_device` makes it, cropped and flipped for `epoch`; every sample by its own draws."""
        image = batch.image
        if self.data.crop < 1 and not self.cut:
            rng = SampleRNG(self.seed, epoch, CROPS, index=batch.index)
            image = resized_crops(image, boxes(rng, *self.shape[1:], self.data.crop))
        if self.data.flip:
            image = flipped(image, SampleRNG(self.seed, epoch, FLIPS, index=batch.index))
        return batch._replace(image=image)

    def _decoded(self, number: int, epoch: int | None) -> tuple[Tensor, int]:
        """The image, uint8 [C, H, W], and its label."""
        row = self.table[int(self.rows[number])]
        if epoch is None or not self.cut:
            image = decode(row["image"], self.shape[0], self.data.size)
        else:
            image = decode(row["image"], self.shape[0], None)
            rng = SampleRNG(self.seed, epoch, CROPS, index=torch.tensor([number]))
            box = boxes(rng, image.shape[1], image.shape[2], self.data.crop)[0].tolist()
            image = functional.resized_crop(
                image, *box, size=[*self.shape[1:]], interpolation=InterpolationMode.BICUBIC
            )
        if image.shape != self.shape:
            raise ValueError(
                f"it is {image.shape[2]}x{image.shape[1]} where most images are {self.shape[2]}x{self.shape[1]}"
                "; give --data.size N to bring all to one size"
            )
        return image, row["label"]

    def name_of(self, index: int) -> str:
        """Where a person finds the sample: its path, or its row."""
        row = int(self.rows[index])
        return self.table[row]["image"]["path"] or f"row {row} of {self.name}"

    def settle(self, problems: Iterable[str]) -> None:
        """Do what the user wants done about images that can't be read: stop, or note them.

        Raises:
            UserError: with `on_bad_image` "stop".
        """
        for problem in problems:
            if self.data.on_bad_image == "stop":
                raise UserError(
                    f"{problem}; mend or remove it, or skip such images with --on-bad-image skip", local=True
                )
            self.bad.add(problem)
            if len(self.bad) == len(self):
                raise UserError(f"none of the {len(self)} images can be used; for example, {problem}", local=True)

    def batches(self, index: Sequence[int], size: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The samples `index` as they are, without augmentation, in batches (uint8); unreadable ones left out.

        Of `world` processes, the one of this rank gets every world-th batch.
        """
        for start in range(rank * size, len(index), world * size):
            batch, problems = self.__getitems__([(None, int(number)) for number in index[start : start + size]])
            self.settle(problems)
            good = batch.index >= 0
            if good.any():
                yield Batch(*(field[good] for field in batch))


def collate(items: list[Item]) -> tuple[Batch, list[str]]:
    """Items as a batch (images still uint8, level 0: the loop fills it in), and what was wrong with them."""
    index = torch.tensor([item.index for item in items])
    label = torch.tensor([item.label for item in items])
    batch = Batch(torch.stack([item.image for item in items]), label, index, torch.zeros(len(items)))
    return batch, [item.problem for item in items if item.problem]


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, its images float32 in [-1, 1]; latents as they are."""
    moved = Batch(*(field.to(device, non_blocking=True) for field in batch))
    return moved if moved.image.is_floating_point() else moved._replace(image=moved.image.float() / 127.5 - 1)
