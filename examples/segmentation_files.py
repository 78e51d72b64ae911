"""Folders of images and masks: which belong together, and what the masks hold."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from segmentation_adapter import IGNORED

from pretrain.core.errors import UserError
from pretrain.data.decode import image_info
from pretrain.data.files import SUFFIXES

ADE20K_CLASSES = 150


def find_pairs(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Image and mask of each path that both folders have, apart from the suffix; what is not used is printed.

    Raises:
        UserError: a folder is missing, a mask has no image, or no image has a mask.
    """
    pictures, labels = _by_name(images, SUFFIXES, "images"), _by_name(masks, {".png"}, "PNG files")
    if alone := sorted(labels.keys() - pictures.keys()):
        example = f"{len(alone):,}, for example {labels[alone[0]]}"
        raise UserError(
            f"masks without an image of their name in {images}: {example}; add the images or remove the masks"
        )
    if not labels:
        raise UserError(f"{masks} has no PNG files; give the folder of the masks")
    if alone := sorted(pictures.keys() - labels.keys()):
        print(f"images without a mask, not used: {len(alone):,} of {len(pictures):,}, for example {pictures[alone[0]]}")
    return [(pictures[name], path) for name, path in labels.items()]


def _by_name(folder: Path, suffixes: set[str], kind: str) -> dict[str, Path]:
    """Files below a folder by their paths without the suffix, sorted; the number of others is printed."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the folder of the {kind}")
    found: dict[str, Path] = {}
    others = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        if path.is_dir() or path.suffix.lower() not in suffixes:
            others.append(path)
            continue
        name = str(path.relative_to(folder).with_suffix(""))
        if name in found:
            raise UserError(f"{found[name]} and {path} differ only in the suffix; keep one of them")
        found[name] = path
    if others:
        print(f"files that are no {kind}, not used: {len(others):,} in {folder}, for example {others[0]}")
    return found


def read_mask(path: Path, ade20k: bool) -> np.ndarray:
    """The class of each pixel, int32 [H, W], or IGNORED.

    Args:
        path: of a PNG file.
        ade20k: whether its values are ADE20K's, where 0 is "other", which is ignored, and 1 to 150 are the classes.

    Raises:
        UserError: it can't be read, or its pixels are no class numbers.
    """
    try:
        with Image.open(path) as picture:
            values, mode = np.array(picture), picture.mode
    except Exception as error:  # image decoders raise exceptions of any type
        raise UserError(f"{path} can't be read: {error}; repair it, or remove it and its image") from None
    if values.ndim != 2:
        raise UserError(f"{path} has colors (mode {mode}); a mask must have one class number per pixel (mode L or P)")
    values = values.astype(np.int32)
    if not ade20k:
        return values
    if (highest := values.max()) > ADE20K_CLASSES:
        raise UserError(f"{path} has the value {highest}; ADE20K's are 0 to {ADE20K_CLASSES}; for others give --masks")
    return np.where(values == 0, IGNORED, values - 1)


def _look(pair: tuple[Path, Path], ade20k: bool) -> np.ndarray:
    """The classes of a mask, int64; its size is compared with the image's."""
    mask, info = read_mask(pair[1], ade20k), image_info({"bytes": None, "path": str(pair[0])})
    if info is not None and info.size != mask.shape:
        raise UserError(
            f"{pair[0]} is {info.size[1]}x{info.size[0]}, its mask {mask.shape[1]}x{mask.shape[0]}; they must be alike"
        )
    found = np.bincount(mask.ravel()).nonzero()[0]
    return found[found != IGNORED]


def check(pairs: list[tuple[Path, Path]], ade20k: bool) -> int:
    """Read all masks, print how many have no valid pixel, and return the number of classes.

    Raises:
        UserError: a mask can't be used, or fewer than two classes occur.
    """
    with ThreadPoolExecutor() as pool:
        found = [*pool.map(_look, pairs, [ade20k] * len(pairs))]
    if empty := [mask for (_, mask), classes in zip(pairs, found, strict=True) if not len(classes)]:
        print(f"masks without a valid pixel, whose loss is 0: {len(empty):,} of {len(pairs):,}, for example {empty[0]}")
    occur = np.unique(np.concatenate(found))
    if len(occur) < 2:
        raise UserError(
            f"{pairs[0][1].parent}: the masks have {'no class' if not len(occur) else f'class {occur[0]} alone'} "
            f"({'0 and ' if ade20k else ''}255 is ignored); they must have two classes at least"
        )
    return ADE20K_CLASSES if ade20k else int(occur[-1]) + 1
