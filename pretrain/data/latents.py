"""Data sets of latents, which `pretrain encode-latents` writes.

The manifest `latents.json` describes the folder. It is written last, so a folder without it is incomplete. `train/` and
`test/` hold shards, tables that `datasets.load_from_disk` maps into memory. `vae/` holds the autoencoder, to decode
generated latents.
"""

import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from pretrain.adapters import Batch
from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.core.files import read_json
from pretrain.core.padding import sample_of
from pretrain.core.rng import generator
from pretrain.data.images import Images, Item

MANIFEST = "latents.json"
UNFINISHED = "unfinished.json"  # the manifest of a folder that is not complete yet
VERSION = 1
FEATURES = datasets.Features(
    {
        # The bytes of float16 [V, M, c, h, w]: V views, as is and mirrored; M moments, mean and standard deviation.
        "latent": datasets.Value("binary"),
        "path": datasets.Value("string"),
        "label": datasets.Value("int64"),
    }
)


class Latents(Images):
    """Labelled latents of one shape, sampled from their distribution in every epoch.

    Args:
        moments: (V, M). V is 2 if the mirrored image is stored too, else 1. M is 2 if the mean and the standard
            deviation of each latent are stored, 1 if only the latent.
        arguments: of `Images`; its table has the columns "latent", "path" and "label".
    """

    def __init__(self, moments: tuple[int, int], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.moments = moments

    @property
    def cacheable(self) -> bool:
        """False, since every epoch samples new latents."""
        return False

    def _item(self, key: tuple[int | None, int], row: dict[str, Any] | None) -> Item:
        """A latent, float32 [c, h, w], sampled and mirrored by random numbers of (seed, epoch, index).

        With epoch None it is not mirrored, and the random numbers depend on the index alone.
        """
        epoch, index = key
        sample = sample_of(index)
        row = row or self.table[int(self.rows[sample])]
        stored = torch.from_numpy(np.frombuffer(row["latent"], np.float16).copy()).view(*self.moments, *self.shape)
        rng = generator(0, sample) if epoch is None else generator(self.seed, epoch, sample)
        mirrored = self.data.flip and epoch is not None and torch.rand((), generator=rng) < 0.5
        return Item(sample_latent(stored[int(mirrored)].float(), rng), row["label"], index, "")

    def augmented(self, batch: Batch, epoch: int) -> Batch:
        """The batch unchanged: `__getitems__` mirrors latents already."""
        return batch

    def name_of(self, index: int) -> str:
        """The path of the encoded image, or its row in the table."""
        row = int(self.rows[index])
        return self.table[row]["path"] or f"row {row} of {self.name}"


def sample_latent(moments: Tensor, rng: torch.Generator) -> Tensor:
    """Sample a latent, float32 [c, h, w], from the normal distribution with the mean and deviation of `moments`.

    Args:
        moments: float32 [M, c, h, w]; mean and standard deviation, or (M = 1) the latent itself.
        rng: of the sample.
    """
    mean, *deviation = moments
    return mean + deviation[0] * torch.randn(mean.shape, generator=rng) if deviation else mean


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder of latents, and compare the sizes of its files.

    Returns:
        The manifest; "splits" gives the number of rows of each split.

    Raises:
        UserError: it can't be read, is of another version, or files are missing or cut off.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest["version"] != VERSION:
            raise UserError(
                f"--data {folder}: the latents have format version {manifest['version']}, this program reads version "
                f"{VERSION}; encode the images again"
            )
        numbers = [*manifest["shape"], *manifest["moments"], manifest["classes"]]
        if not all(isinstance(number, int) and number >= 0 for number in numbers) or len(manifest["shape"]) != 3:
            raise ValueError("its shape, moments or classes are not valid")
        if len(manifest["moments"]) != 2 or {*manifest["splits"]} != {"train", "test"}:
            raise ValueError("its moments or splits are not valid")
        for split, (rows, size) in manifest["splits"].items():
            found = sum(file.stat().st_size for file in (folder / split).rglob("*.arrow"))
            if found != size:
                raise UserError(
                    f"--data {folder}: the data set is cut off: its {split}/ has {found:,} bytes where {size:,} were "
                    "written; copy it again, or encode the images again"
                )
            manifest["splits"][split] = rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"--data {folder}: its {MANIFEST} can't be read ({type(error).__name__}: {error}); copy it again, or "
            "encode the images again"
        ) from None
    return manifest


def open_splits(folder: Path, manifest: dict[str, Any], data: Data, seed: int) -> dict[str, Latents]:
    """Open the splits of a folder of latents.

    Args:
        folder: that `pretrain encode-latents` wrote.
        manifest: as `read_manifest` returns it.
        data: the settings; `limit` and `held_out` are not applied here.
        seed: of the samples and of mirroring.

    Returns:
        "train" and "test", with all of their rows.

    Raises:
        UserError: the folder can't be read, or does not allow the settings in `data`.
    """
    views, moments = manifest["moments"]
    for not_allowed, setting, hint in (
        (data.flip and views < 2, "flip", "encode the images with --data.flip, which stores both views"),
        (data.crop < 1, "crop", "leave it out: a crop of a latent is not the latent of a crop"),
        (data.size is not None, "size", "leave it out: latents keep the size that images had when they were encoded"),
        (data.channels is not None, "channels", "leave it out: latents have the autoencoder's channels"),
        (data.range is not None, "range", "leave it out: it belongs to the images that are encoded"),
        (data.pages is not None, "pages", "leave it out: it belongs to the images that are encoded"),
        (data.train_split is not None, "train_split", "leave it out: splits were chosen when images were encoded"),
        (data.test_split is not None, "test_split", "leave it out: splits were chosen when images were encoded"),
        (data.image is not None, "image", "leave it out: columns were chosen when images were encoded"),
        (data.label is not None, "label", "leave it out: columns were chosen when images were encoded"),
    ):
        if not_allowed:
            raise UserError(f"--data.{setting.replace('_', '-')}: not possible with the latents in {folder}; {hint}")
    splits = {}
    for split, rows in manifest["splits"].items():
        shards = sorted(path for path in (folder / split).iterdir() if path.is_dir())
        try:
            load: Any = datasets.load_from_disk
            table = datasets.concatenate_datasets([load(shard) for shard in shards])
        except Exception as error:  # arrow raises exceptions of many types
            cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(
                f"--data {folder}: its latents can't be read: {cause}; copy it again, or encode the images again"
            ) from None
        shape, all_rows = tuple(manifest["shape"]), np.arange(rows)
        if len(table) != rows or len(table[0]["latent"]) != 2 * views * moments * math.prod(shape):
            raise UserError(f"--data {folder}: its {split}/ does not match its {MANIFEST}; encode the images again")
        splits[split] = Latents((views, moments), table, all_rows, shape, data, seed, f"{folder}, {split}")
    return splits
