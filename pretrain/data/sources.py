"""Opening data sets: images in a folder, in parquet files or on the Hugging Face hub, and folders of latents."""

import glob
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import numpy as np
import torch
from torch import Tensor

from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.core.rng import generator
from pretrain.data import latents
from pretrain.data.autoencoder import Autoencoder, open_autoencoder
from pretrain.data.decode import image_info
from pretrain.data.images import Images

EMBEDDED = {"fashion-mnist": Path(__file__).parent / "fashion_mnist"}
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif", ".jp2"}
LABELS = ("label", "labels", "class", "cls", "target")  # names of columns that hold a class
TEST_SPLITS = ("test", "validation", "val", "valid", "eval")
MAX_HEADERS = 64  # images, evenly spaced, whose headers are read to find the size and channels of a data set


class Source(NamedTuple):
    """An open data set."""

    train: Images
    test: Images  # held out for evaluation
    shape: tuple[int, int, int]  # (C, H, W) of the images, or of the latents
    classes: int  # number of classes; 0 without labels
    autoencoder: Autoencoder | None = None  # that encoded the latents, in a data set of latents

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


def _look(table: datasets.Dataset, data: Data) -> tuple[int, int, int]:
    """(C, H, W) of a data set: the settings, or else the most frequent size and the colours of some images.

    Raises:
        UserError: `data.size` is None and none of these images can be read.
    """
    rows = np.unique(np.linspace(0, len(table) - 1, MAX_HEADERS).astype(int))
    glances = [image_info(table[int(row)]["image"]) for row in rows]
    readable = [seen for seen in glances if seen is not None]
    if not readable and data.size is None:
        raise UserError(f"--data {data.source}: none of the {len(rows)} images that were tried can be read")
    common = Counter(seen.size for seen in readable).most_common(1)
    height, width = (data.size, data.size) if data.size else common[0][0]
    return data.channels or (1 if all(seen.grey for seen in readable) else 3), height, width


def is_cache(source: str) -> bool:
    """Whether `source` is a folder of latents, complete or not."""
    return any((Path(source).expanduser() / name).is_file() for name in (latents.MANIFEST, latents.UNFINISHED))


def open_data(data: Data, seed: int) -> Source:
    """Open the data set that `data` names.

    The held-out images are those of its test split, or a random tenth of its images (at most `data.held_out`) that
    depends on no seed.

    Args:
        data: the settings.
        seed: of augmentation and of the sampling of latents.

    Raises:
        UserError: there is no such data set, it has no images, or its table can't be read.
    """
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    folder = Path(data.source).expanduser()
    if (folder / latents.MANIFEST).is_file():
        return _latents(folder, data, seed)
    if (folder / latents.UNFINISHED).is_file():
        raise UserError(f"--data {data.source}: its latents are not finished; run `pretrain encode-latents` again")
    splits = {name: table for name, table in _splits(data.source).items() if len(table)}
    if not splits:
        raise UserError(f"--data {data.source}: there are no images in it")
    train_name = "train" if "train" in splits else next(iter(splits))
    test_name = next((name for name in TEST_SPLITS if name in splits and name != train_name), None)
    train, classes = _readable(splits[train_name], data.source, None)
    rows = np.arange(len(train))
    if test_name:
        test = _readable(splits[test_name], data.source, classes)[0]
        chosen = _some(np.arange(len(test)), data.held_out, 0)
    else:
        if len(train) < 2:
            raise UserError(
                f"--data {data.source}: one image is not enough, since at least one is held out for evaluation"
            )
        test, test_name = train, train_name
        order = torch.randperm(len(train), generator=generator(0)).numpy()
        chosen, rows = np.split(order, [max(1, min(data.held_out, len(train) // 10))])
        chosen = np.sort(chosen)
    rows = _some(rows, data.limit, 1)
    shape = _look(train, data)
    return Source(
        Images(train, rows, shape, data, seed, f"{data.source}, {train_name}"),
        Images(test, chosen, shape, data, seed, f"{data.source}, {test_name}"),
        shape,
        len(classes),
    )


def _some(rows: np.ndarray, most: int | None, stream: int) -> np.ndarray:
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
        images.rows = _some(images.rows, most, stream)
    return Source(splits["train"], splits["test"], splits["train"].shape, manifest["classes"], autoencoder)


def _readable(table: Any, source: str, known: dict[Any, int] | None) -> tuple[datasets.Dataset, dict[Any, int]]:
    """`_columns`, with errors of any type as a `UserError`."""
    try:
        return _columns(table, source, known)
    except UserError:
        raise
    except Exception as error:  # a column does not hold what its name says; arrow raises many types
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"--data {source}: its images or labels can't be read: {said}") from None


def _splits(source: str) -> dict[str, Any]:
    """The tables of a data set by the name of the split.

    Raises:
        UserError: there is no such data set, or it can't be read.
    """
    load: Any = datasets.load_dataset
    path = EMBEDDED.get(source, Path(source).expanduser())
    try:
        if path.is_file():
            if path.suffix != ".parquet":
                raise UserError(f"--data {source}: a file must be a parquet file, or give a folder of images")
            return {"train": load("parquet", data_files=glob.escape(str(path)), split="train")}
        if path.is_dir():
            if any(path.rglob("*.parquet")):
                return {str(name): table for name, table in load("parquet", data_dir=glob.escape(str(path))).items()}
            return _folder(path)
        if source.startswith((".", "/", "~")) or source.count("/") > 1 or not source:
            raise UserError(f"--data {source}: there is no such file or folder")
        _ask_hub(source)
        return {str(name): table for name, table in load(source).items()}
    except UserError:
        raise
    except Exception as error:  # arrow and the hub raise many types
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if not path.exists():
            raise UserError(
                f"--data {source}: there is no such file or folder, and loading it from Hugging Face failed with {said}"
            ) from None
        raise UserError(f"--data {source}: reading it failed with {said}") from None


def _ask_hub(name: str) -> None:
    """Raise if the hub has no such data set; `load_dataset` would retry six times first.

    Raises:
        UserError: there is no such data set, or the hub can't be reached.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:  # only data sets in the local cache can be loaded
        return
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
    except (huggingface_hub.errors.RepositoryNotFoundError, huggingface_hub.errors.HFValidationError):
        raise UserError(
            f"--data {name}: there is no file or folder of that name, nor a Hugging Face data set"
        ) from None
    except Exception as error:  # the hub can't be reached
        raise UserError(
            f"--data {name}: there is no file or folder of that name, and Hugging Face can't be reached "
            f"({type(error).__name__}: {error}); HF_HUB_OFFLINE=1 loads a data set that is in the local cache"
        ) from None


def _folder(root: Path) -> dict[str, datasets.Dataset]:
    """Tables of the images below a folder, sorted by path; an image's class is the first folder of its path."""
    below = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    if "train" in below:
        roots = {name: path for name, path in below.items() if name in ("train", *TEST_SPLITS)}
    else:
        roots = {"train": root}
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    tables = {}
    for split, root in roots.items():
        paths = sorted(_images_below(root))
        below_root = [path.relative_to(root).parts for path in paths]
        label = [parts[0] if len(parts) > 1 else None for parts in below_root]
        columns = {"image": [str(path) for path in paths], "label": label}
        tables[split] = datasets.Dataset.from_dict(columns, features=features)
    return tables


def _images_below(root: Path) -> Iterator[Path]:
    """Paths of all images below a folder, also through links, without hidden files and folders."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder that was already walked
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in files:
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(folder, name)


def _columns(
    table: datasets.Dataset, source: str, known: dict[Any, int] | None
) -> tuple[datasets.Dataset, dict[Any, int]]:
    """The table with its columns "image" (encoded) and "label" only, and the number of each class.

    Args:
        table: with a column of images, and maybe one of labels.
        source: the name of the data set, for messages.
        known: numbers of the classes; None: classes are numbered in the order of the table's class names, or of its
            sorted labels. A label that is not in it becomes -1.

    Raises:
        UserError: no column holds images.
    """
    features = table.features
    image = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
    image = image or next((name for name in ("image", "img", "png", "jpg") if name in features), None)
    if image is None:
        raise UserError(f"--data {source}: no column holds images; its columns are {', '.join(features)}")
    columns = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    columns += [name for name in LABELS if isinstance(features.get(name), datasets.Value)]
    values: list[Any] = list(table[columns[0]]) if columns else [None] * len(table)
    kind = features[columns[0]] if columns else None
    if isinstance(kind, datasets.ClassLabel):
        values = [kind.names[value] if value is not None and value >= 0 else None for value in values]
    if known is None:
        given = kind.names if isinstance(kind, datasets.ClassLabel) else sorted({*values} - {None, -1})
        known = {value: number for number, value in enumerate(given)}
    table = (
        table.select_columns([image])
        .rename_columns({image: "image"})
        .cast_column("image", datasets.Image(decode=False))
    )
    return table.add_column("label", np.array([known.get(value, -1) for value in values])), known
