"""Latents on disk, encoded once by `pretrain encode-latents`, read as any other data set.

A cache is a folder: `latents.json` says what is in it and is written last, so that a folder without it is no cache;
`train/` and `test/` hold shards, each a table that `datasets.load_from_disk` maps into memory; `vae/` is the
autoencoder, which decodes what is generated.
"""

import json
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
from pretrain.core.padding import sample_of
from pretrain.core.rng import generator
from pretrain.data.images import Images, Item

MANIFEST = "latents.json"
UNFINISHED = "unfinished.json"  # what the manifest is called until then
VERSION = 1
FEATURES = datasets.Features(
    {
        # Flat float16 [V, M, c, h, w]: as it is, then mirrored where the cache has both; mean, then deviation.
        "latent": datasets.Value("binary"),
        "path": datasets.Value("string"),
        "label": datasets.Value("int64"),
    }
)


class Latents(Images):
    """Labelled latents of one shape, sampled from their distribution in every epoch.

    Args:
        moments: (V, M): views of each image, 1 or 2 with the mirrored one; moments of each, mean and perhaps deviation.
        others: see `Images`.
    """

    def __init__(self, moments: tuple[int, int], *others: Any) -> None:
        super().__init__(*others)
        self.moments = moments

    @property
    def cacheable(self) -> bool:
        """False: every epoch samples another latent."""
        return False

    def __getitem__(self, key: tuple[int | None, int]) -> Item:
        """A latent of (epoch, index), sampled and mirrored for that epoch; epoch None: always the same one."""
        epoch, index = key
        sample = sample_of(index)
        row = self.table[int(self.rows[sample])]
        stored = torch.from_numpy(np.frombuffer(row["latent"], np.float16).copy()).view(*self.moments, *self.shape)
        chance = generator(0, sample) if epoch is None else generator(self.seed, epoch, sample)
        mirrored = self.data.flip and epoch is not None and torch.rand((), generator=chance) < 0.5
        return Item(drawn(stored[int(mirrored)].float(), chance), row["label"], index, "")

    def augmented(self, batch: Batch, epoch: int) -> Batch:
        """Latents are mirrored as they are read, of the views that there are."""
        return batch

    def name_of(self, index: int) -> str:
        """The path of the image that was encoded, or its row."""
        row = int(self.rows[index])
        return self.table[row]["path"] or f"row {row} of {self.name}"


def drawn(moments: Tensor, chance: torch.Generator) -> Tensor:
    """A latent [c, h, w] from its mean and, if there is one, its standard deviation [M, c, h, w]."""
    mean, *deviation = moments
    return mean + deviation[0] * torch.randn(mean.shape, generator=chance) if deviation else mean


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a cache says of itself.

    Raises:
        UserError: it is not whole.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["version"] != VERSION:
            raise UserError(
                f"--data {folder}: the cache is of version {manifest['version']}, this program reads {VERSION}; "
                "encode the images again"
            )
        numbers = [*manifest["shape"], *manifest["moments"], manifest["classes"]]
        if not all(isinstance(number, int) and number >= 0 for number in numbers) or len(manifest["shape"]) != 3:
            raise ValueError("its shape, moments or classes are none")
        if len(manifest["moments"]) != 2 or {*manifest["splits"]} != {"train", "test"}:
            raise ValueError("its moments or splits are none")
        for split, (rows, size) in manifest["splits"].items():
            found = sum(file.stat().st_size for file in (folder / split).rglob("*.arrow"))
            if found != size:
                raise UserError(
                    f"--data {folder}: the cache is cut off: its {split}/ has {found:,} bytes where {size:,} were "
                    "written; copy it again, or encode the images again"
                )
            manifest["splits"][split] = rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        said = f"its {MANIFEST} can't be read ({type(error).__name__}: {error})"
        raise UserError(f"--data {folder}: {said}; copy it again, or encode the images again") from None
    return manifest


def tables(folder: Path, manifest: dict[str, Any], data: Data, seed: int) -> dict[str, Latents]:
    """The splits of a cache, whole.

    Raises:
        UserError: it can't be read, or not as `data` says.
    """
    views, moments = manifest["moments"]
    for given, setting, said in (
        (data.flip and views < 2, "flip", "encode the images with --data.flip, both views are kept then"),
        (data.crop < 1, "crop", "leave it out: a crop of a latent is none of the image"),
        (data.size is not None, "size", "leave it out: latents keep the size that images had when they were encoded"),
        (data.channels is not None, "channels", "leave it out: latents have the autoencoder's channels"),
        (data.range is not None, "range", "leave it out: it belongs to the images that are encoded"),
        (data.pages is not None, "pages", "leave it out: it belongs to the images that are encoded"),
        (data.train_split is not None, "train_split", "leave it out: splits were chosen when images were encoded"),
        (data.test_split is not None, "test_split", "leave it out: splits were chosen when images were encoded"),
        (data.image is not None, "image", "leave it out: columns were chosen when images were encoded"),
        (data.label is not None, "label", "leave it out: columns were chosen when images were encoded"),
    ):
        if given:
            raise UserError(f"--data.{setting.replace('_', '-')}: {folder} holds latents and can't give that; {said}")
    found = {}
    for split, rows in manifest["splits"].items():
        shards = sorted(path for path in (folder / split).iterdir() if path.is_dir())
        try:
            load: Any = datasets.load_from_disk
            table = datasets.concatenate_datasets([load(shard) for shard in shards])
        except Exception as error:  # whatever arrow has to say
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(
                f"--data {folder}: its latents can't be read: {said}; copy it again, or encode the images again"
            ) from None
        shape, whole = tuple(manifest["shape"]), np.arange(rows)
        if len(table) != rows or len(table[0]["latent"]) != 2 * views * moments * math.prod(shape):
            raise UserError(f"--data {folder}: its {split}/ does not hold what its {MANIFEST} says; encode it again")
        found[split] = Latents((views, moments), table, whole, shape, data, seed, f"{folder}, {split}")
    return found
