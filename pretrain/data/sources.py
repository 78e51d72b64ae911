"""Opening what `--data` names: images that ship with the package, folders, parquet files, Hugging Face data sets.

`splits` says which files belong to which split, `tables` which columns are meant; here it becomes two `Images`, and a
`Report` of what was taken.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor

from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.core.files import expand
from pretrain.core.rng import generator
from pretrain.core.text import listed
from pretrain.data import latents
from pretrain.data.autoencoder import Autoencoder, open_autoencoder
from pretrain.data.decode import ImageInfo, Reading, decode, image_info
from pretrain.data.find import Part, find_parts
from pretrain.data.fingerprint import digest
from pretrain.data.images import Images
from pretrain.data.ranges import find_range, largest_of
from pretrain.data.report import Report
from pretrain.data.splits import NONE, class_key
from pretrain.data.subset import Subset, read_subset
from pretrain.data.tables import array_type, class_names, match
from pretrain.data.tiff import PICTURES

MAX_LOOKED_AT = 64  # images, evenly spaced, whose size, channels and range are those of the data set


class Source(NamedTuple):
    """An opened data set.

    Attributes:
        train: images to train on.
        test: images to evaluate on.
        shape: (C, H, W) of all.
        classes: number of classes; 0 without labels.
        autoencoder: that encoded the latents, in a data set of latents.
        class_names: of the classes.
        report: how the data set was interpreted; None if a program made the source itself.
        subset: which of the training images `train` has; None: all.
    """

    train: Images
    test: Images
    shape: tuple[int, int, int]
    classes: int
    autoencoder: Autoencoder | None = None
    class_names: tuple[str, ...] = ()
    report: Report | None = None
    subset: Subset | None = None

    @property
    def weights(self) -> Tensor | None:
        """float32 [N], 1 on average; what each training image counts for. None: all alike."""
        return self.subset.weights if self.subset else None

    @property
    def seen_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images, or of the images that latents decode to."""
        return self.autoencoder.image_shape(self.shape) if self.autoencoder else self.shape

    def seen(self, image: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] of a batch's images, or decoded from its latents."""
        return self.autoencoder.decode(image) if self.autoencoder else image

    @property
    def made_by(self) -> str | None:
        """The fingerprint of the autoencoder that encoded the latents; None for images."""
        return self.autoencoder.fingerprint if self.autoencoder else None


def _look(
    table: datasets.Dataset, data: Data, report: Report, reading: Reading
) -> tuple[tuple[int, int, int], Reading]:
    """(C, H, W) and the range of a data set, from some of its images and the settings."""
    rows = np.unique(np.linspace(0, len(table) - 1, MAX_LOOKED_AT).astype(int))
    seen = [
        found for row in rows if (found := image_info(table[int(row)]["image"], reading, data.channels)) is not None
    ]
    if not seen:
        try:
            decode(table[int(rows[0])]["image"], data.channels or 3, None, reading)
            said = ""
        except Exception as error:  # image decoders raise exceptions of any type
            said = f" (of the first one: {' '.join(str(error).split())})"
        raise UserError(f"--data {data.source}: none of {len(rows)} images that were tried can be read{said}")
    if len(seen) < len(rows):
        report.note(f"{len(rows) - len(seen)} of {len(rows)} images that were looked at can't be read")
    sizes = Counter(found.size for found in seen).most_common()
    height, width = (data.size, data.size) if data.size else sizes[0][0]
    if data.size is not None:
        report.size = f"resized and cropped to {data.size}x{data.size}"
    elif len(sizes) > 1:
        report.note(
            f"of {len(seen)} images that were looked at {len(seen) - sizes[0][1]} are not {width}x{height} and can't "
            "be used; --data.size N resizes all"
        )
    channels, seen = _channels(seen, data, report)
    if data.channels is None:
        reading = reading._replace(bands=1 if channels == 1 else 3 + any(found.unused for found in seen))
    if channels in (1, 3) and (count := sum(found.unused for found in seen)):
        report.note(f"{count} of {len(seen)} images have a fourth band, which is not used; --data.channels 4 uses it")
    return (channels, height, width), _with_range(seen, array_type(table.features["image"]), data, report, reading)


def _channels(seen: list[ImageInfo], data: Data, report: Report) -> tuple[int, list[ImageInfo]]:
    """The number of channels of a data set, and those of the images that were looked at that have them."""
    bands = Counter(found.bands for found in seen).most_common()[0][0]
    channels = data.channels or bands or (1 if all(found.grey for found in seen if not found.bands) else 3)
    if data.channels is None and bands:
        report.note(f"images have {bands} bands, and all of them are used (--data.channels)")
    wanted = (0,) if channels in PICTURES else (0, channels) if channels == 2 else (channels,)  # 2: grey and alpha, too
    usable = [found for found in seen if found.bands in wanted]
    if len(usable) < len(seen):
        report.note(
            f"of {len(seen)} images that were looked at {len(seen) - len(usable)} have other bands and can't be used"
        )
    return channels, usable or seen


def _with_range(seen: list[ImageInfo], column: str, data: Data, report: Report, reading: Reading) -> Reading:
    """The range of images that are not 8-bit, from their type or the largest value of those that were looked at.

    Args:
        seen: what was found of these images.
        column: type of the values, if they are from a column of arrays.
        data: the settings.
        report: gets the range.
        reading: how images are read.
    """
    if data.range is not None:
        report.range = f"values {data.range[0]:g} to {data.range[1]:g}"
        return reading
    deep: dict[str, list[tuple[float, float, bool]]] = {}
    for one in seen:
        if one.extrema is not None:
            deep.setdefault(column or one.what, []).append(one.extrema)
    if not deep:
        return reading
    low, high, _ = largest_of([extrema for group in deep.values() for extrema in group])
    kinds, ranges = ", ".join(sorted(deep)), {}
    for kind, group in deep.items():
        try:
            ranges[kind] = (0.0, 255.0) if kind == "uint8" else find_range(*largest_of(group))
        except ValueError as error:
            raise UserError(
                f"--data {data.source}: its images have {error} ({kind}), and what is black and white among them is "
                "not known; set --data.range LOW HIGH"
            ) from None
    if len({*ranges.values()}) > 1:
        said = " and ".join(f"{kind} values {bottom:g} to {top:g}" for kind, (bottom, top) in ranges.items())
        raise UserError(
            f"--data {data.source}: its images have {said}, and only one range can be used; bring them to one"
        )
    (found,) = {*ranges.values()}
    report.range = f"{kinds} values {found[0]:g} to {found[1]:g}, seen are {low:g} to {high:g}"
    if (count := sum(map(len, deep.values()))) < len(seen):
        report.note(
            f"{count} of {len(seen)} images are not 8-bit; only of these {found[0]:g} to {found[1]:g} is the range"
        )
    if high < found[1] / 4:
        text = f"the images are dark: their values reach {high:g} of {found[1]:g}"
        report.note(f"{text}; --data.range {low:g} {high:g} would spread them" if low < high else text)
    return reading._replace(range=found)


def is_cache(source: str) -> bool:
    """Whether `source` is a folder of latents, complete or not."""
    return any(_holds(expand(source), name) for name in (latents.MANIFEST, latents.UNFINISHED))


def _holds(folder: Path, name: str) -> bool:
    """Whether a folder has a file of this name; False if it can't be opened, which is reported where it is read."""
    return os.path.isfile(folder / name)  # noqa: PTH113


def open_data(data: Data, seed: int, classes: Sequence[str] | None = None) -> Source:
    """Find the images that `data` names and their held-out part.

    Args:
        data: the settings.
        seed: of the augmentation.
        classes: names of classes by which labels are numbered; images of others are unlabelled; None: the data set's.

    Raises:
        UserError: there are no images, they can't be read, or what is meant is ambiguous.
    """
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error it also raises
    folder = expand(data.source)
    if _holds(folder, latents.MANIFEST):
        return _latents(folder, data, seed)
    if _holds(folder, latents.UNFINISHED):
        raise UserError(
            f"--data {data.source}: the latents in it are not finished; run `pretrain encode-latents` again"
        )
    report = Report(data.source)
    train, *others = find_parts(data, report)
    names = _classes(train, report) if classes is None else [*classes]
    test = _held_out(train, others, names, data, report)
    labels = _labels(train, names, report)
    table, rows = train.table(labels), np.arange(len(train))
    reading = Reading(data.range, data.range is not None, data.pages, train.folders, shards=train.shards)
    if test is not None:
        chosen = some_rows(np.arange(len(test)), data.held_out, 0)
        test_table, test_name = test.table(_labels(test, names, report)), test.name
    else:
        if len(train) < 2:
            raise UserError(f"--data {data.source}: one image is not enough, one at least is held out for evaluation")
        test_table, test_name = table, train.name
        order = torch.randperm(len(train), generator=generator(0)).numpy()
        chosen, rows = np.split(order, [max(1, min(data.held_out, len(train) // 10))])
        chosen = np.sort(chosen)
    rows = some_rows(rows, data.limit, 1)
    subset = read_subset(data.subset, len(rows)) if data.subset else None
    rows = rows if subset is None else rows[subset.index]
    shape, reading = _look(table, data, report, reading)
    found = Source(
        Images(table, rows, shape, data, seed, f"{data.source}, {train.name}", reading),
        Images(
            test_table,
            chosen,
            shape,
            data,
            seed,
            f"{data.source}, {test_name}",
            reading._replace(folders=test.folders, shards=test.shards) if test else reading,
        ),
        shape,
        len(names),
        None,
        tuple(names),
        report,
        subset,
    )
    _complete(report, found, labels[rows], train, test)
    return found


def _complete(report: Report, source: Source, labels: np.ndarray, train: Part, test: Part | None) -> None:
    """Enter the counts, and check that a subset is of these images.

    Raises:
        UserError: it is of others.
    """
    if (subset := source.subset) is not None:
        report.subset = subset.to_dict()
        if subset.fingerprint not in ("", digest(source.train)):
            raise UserError(
                f"--data.subset {subset.file}: it is of other images than those of --data {report.source}; give the "
                "data set that it was made of, with the same --data.* settings, or make a new subset"
            )
    report.shape = source.shape
    report.images, report.labels = train.images, train.labels
    report.splits = {
        "train": {"name": train.name, "used": len(source.train), "images": len(train)},
        "test": {"name": (test or train).name, "used": len(source.test), "images": len(test or train)},
    }
    counts = np.bincount(labels + 1, minlength=source.classes + 1).tolist()
    report.classes = {name: count for name, count in zip(source.class_names, counts[1:], strict=True)} | {"": counts[0]}


def _classes(train: Part, report: Report) -> list[str]:
    """The names of the training data's classes."""
    if any(isinstance(value, float) and not value.is_integer() for value in train.values):
        report.note(f"the labels ({train.labels}) are fractions, no classes, and are not used")
        return []
    names = class_names(train.values) if train.given is None else train.given
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(class_key(name), []).append(name)
    if several := [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]:
        report.note(f"classes of their own, though their names are nearly the same: {listed(several)}")
    if len(names) == 1:
        report.note(f"all labels are {names[0]} ({train.labels}); one class is none, so they are not used")
        return []
    return names


def _labels(part: Part, names: list[str], report: Report) -> np.ndarray:
    """The number of each image's class, -1 where it has none."""
    return match(part.values, names, report.note) if names else np.full(len(part), -1)


def _held_out(train: Part, others: Sequence[Part], names: list[str], data: Data, report: Report) -> Part | None:
    """The part to evaluate on: the first one that has labels, if the training data has; None: there is none."""
    if data.test_split == NONE:
        chosen = None
    else:
        labelled = [part for part in others if names and (match(part.values, names, lambda _: None) >= 0).any()]
        chosen = next(iter([*labelled, *others]), None)
        if chosen is not None and names and not labelled:
            report.note(f"{chosen.name} has no labels of the training classes: accuracies can't be measured on it")
        if chosen is not None and not names and any(value is not None for value in chosen.values):
            report.note(f"the labels of {chosen.name} are not used, as the training images have none")
        if chosen is not None and chosen.images != train.images:
            report.note(f"the images of {chosen.name} are those of {chosen.images}")
        if chosen is not None and labelled and chosen.labels != train.labels:
            report.note(f"the labels of {chosen.name} are those of {chosen.labels}")
    for part in others:
        if part is not chosen:
            report.note(f"{part.name} ({len(part):,} images) is not used (--data.test-split {part.name})")
    return chosen


def some_rows(rows: np.ndarray, most: int | None, stream: int) -> np.ndarray:
    """A random subset of at most `most` rows, in ascending order; always the same one for a `stream`."""
    if most is not None and len(rows) > most:
        rows = rows[torch.randperm(len(rows), generator=generator(stream)).numpy()[:most]]
    return np.sort(rows)


def _latents(folder: Path, data: Data, seed: int) -> Source:
    """A folder of latents, with its autoencoder.

    Raises:
        UserError: it can't be read, or its autoencoder is missing or another one.
    """
    manifest = latents.read_manifest(folder)
    if not (folder / "vae" / "config.json").is_file():
        raise UserError(
            f"--data {folder}: the autoencoder that made its latents is gone from its vae/; put it back, or encode the "
            "images again"
        )
    autoencoder = open_autoencoder(folder / "vae")
    if autoencoder.identity != manifest["autoencoder"]:
        raise UserError(
            f"--data {folder}: its latents were made by another autoencoder than the one in its vae/, which can't "
            "decode them; put the right one back, or encode the images again"
        )
    splits = latents.open_splits(folder, manifest, data, seed)
    for images, most, stream in ((splits["train"], data.limit, 1), (splits["test"], data.held_out, 0)):
        images.rows = some_rows(images.rows, most, stream)
    train, test = splits["train"], splits["test"]
    subset = read_subset(data.subset, len(train)) if data.subset else None
    train.rows = train.rows if subset is None else train.rows[subset.index]
    names = tuple(manifest.get("class_names") or map(str, range(manifest["classes"])))
    report = Report(data.source)
    source = Source(train, test, train.shape, manifest["classes"], autoencoder, names, report, subset)
    labels = np.asarray(train.table["label"], np.int64)[train.rows]
    parts = [
        Part(name, [None] * rows, None, None, f"latents of {autoencoder.fingerprint}", "the images' labels")
        for name, rows in manifest["splits"].items()
    ]
    _complete(report, source, labels, *parts)
    return source
