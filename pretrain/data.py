"""Images on disk, in parquet files or on the Hugging Face hub, by index.

Every sample has a number that never moves, and what is done to it is a function of (seed, epoch, number).
An image that can't be read keeps its number too: its slot is marked as one that does not count.
"""

import io
import os
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from pretrain.adapter import Batch
from pretrain.config import Data
from pretrain.errors import Refused
from pretrain.rng import generator, key

EMBEDDED = {"fashion-mnist": Path(__file__).parent / "embedded" / "fashion_mnist"}
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif", ".jp2"}
TEST_SPLITS = ("test", "validation", "val", "valid", "eval")
LOOKED_AT = 64  # images whose headers say what the data set's size and channels are


class Item(NamedTuple):
    """One visit, as a worker hands it over."""

    image: Tensor  # uint8 [C, H, W]
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
        steps: list[v2.Transform] = []
        if data.crop < 1:
            steps.append(
                v2.RandomResizedCrop(shape[1:], scale=(data.crop, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
            )
        if data.flip:
            steps.append(v2.RandomHorizontalFlip())
        self.augment = v2.Compose(steps) if steps else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, visit: tuple[int | None, int]) -> Item:
        """The sample `index`, augmented for `epoch` (None: as it is); a negative index stays one."""
        epoch, index = visit
        number = ~index if index < 0 else index
        row = self.table[int(self.rows[number])]
        try:
            image = decode(row["image"], self.shape[0], self.data.size)
            if image.shape != self.shape:
                raise ValueError(
                    f"it is {image.shape[2]}x{image.shape[1]} where the first image is {self.shape[2]}x{self.shape[1]}"
                    "; give --data.size N to bring all to one size"
                )
        except Exception as error:  # image decoders raise whatever they like
            name = row["image"]["path"] or f"row {self.rows[number]} of {self.name}"
            problem = f"{name} can't be used: {' '.join(str(error).split())}"
            return Item(torch.zeros(self.shape, dtype=torch.uint8), -1, ~number, problem)
        if self.augment is not None and epoch is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(key(self.seed, epoch, number))
                image = self.augment(image)
        return Item(image, row["label"], index, "")

    def settle(self, problems: Iterable[str]) -> None:
        """Do what the user wants done about images that can't be read: stop, or note them.

        Raises:
            Refused: with `on_bad_image` "stop".
        """
        for problem in problems:
            if self.data.on_bad_image == "stop":
                raise Refused(f"{problem}; mend or remove it, or skip such images with --on-bad-image skip", local=True)
            self.bad.add(problem)
            if len(self.bad) == len(self):
                raise Refused(f"none of the {len(self)} images can be used; for example, {problem}", local=True)

    def batches(self, index: Sequence[int], size: int) -> Iterator[Batch]:
        """The samples `index` as they are, without augmentation, in batches (uint8); unreadable ones left out."""
        for start in range(0, len(index), size):
            batch, problems = collate([self[None, int(number)] for number in index[start : start + size]])
            self.settle(problems)
            good = batch.index >= 0
            if good.any():
                yield Batch(*(field[good] for field in batch))


class Source(NamedTuple):
    """What a data set comes down to."""

    train: Images
    test: Images
    shape: tuple[int, int, int]  # (C, H, W)
    classes: int  # 0 where there are no labels


class Visits(Sampler[tuple[int, int]]):
    """An InfoBatch's indices together with the epoch, which persistent workers can't know otherwise."""

    def __init__(self, infobatch: Any) -> None:
        self.infobatch = infobatch

    def __len__(self) -> int:
        return len(self.infobatch)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.infobatch.epoch
        return ((epoch, index) for index in self.infobatch)


def collate(items: list[Item]) -> tuple[Batch, list[str]]:
    """Items as a batch (image still uint8, level 0: the loop fills it in), and what was wrong with them."""
    index = torch.tensor([item.index for item in items])
    label = torch.tensor([item.label for item in items])
    batch = Batch(torch.stack([item.image for item in items]), label, index, torch.zeros(len(items)))
    return batch, [item.problem for item in items if item.problem]


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, its images float32 in [-1, 1]."""
    moved = Batch(*(field.to(device, non_blocking=True) for field in batch))
    return moved._replace(image=moved.image.float() / 127.5 - 1)


def loader(images: Images, sampler: Sampler[Any], batch_size: int) -> DataLoader[Any]:
    """A loader of (Batch, problems); it draws nothing from the global generator."""
    return DataLoader(
        images,
        batch_size,
        sampler=sampler,
        num_workers=images.data.workers,
        collate_fn=collate,
        persistent_workers=images.data.workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_trainer,
        generator=torch.Generator(),
    )


def _leave_signals_to_the_trainer(worker: int) -> None:
    """A signal to the whole process group must not take the workers before the trainer has written its state."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# -- decoding --------------------------------------------------------------------------------------


def decode(image: dict[str, Any], channels: int, size: int | None) -> Tensor:
    """uint8 [C, H, W] from {"bytes", "path"}: upright, without alpha, 8 bits a channel.

    Args:
        image: encoded bytes, or where they lie.
        channels: 1 or 3.
        size: scale the shorter side to it and crop the middle; None leaves the image's own size.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)  # handled below
        with Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as picture:
            picture.load()
            picture = ImageOps.exif_transpose(picture)
            if picture.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):  # PIL would clip 16 bits, not scale them
                values = np.asarray(picture).astype(np.int64)
                if values.min() < 0 or values.max() > 65535:
                    raise ValueError(f"its values span {values.min()} to {values.max()}, more than 16 bits")
                picture = Image.fromarray((values // 257).astype(np.uint8))
            elif picture.mode == "F":
                raise ValueError("it has floating-point values, whose range is not known; save it with 8 or 16 bits")
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            picture = picture.convert("L" if channels == 1 else "RGB")
    if size is not None and picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(picture))
    return values.view(picture.height, picture.width, channels).permute(2, 0, 1).contiguous()


def _grey_palette(picture: Image.Image) -> bool:
    """Whether an image has a palette and it holds nothing but greys."""
    colours: Any = picture.convert("RGB").getcolors(256) if picture.mode in ("P", "PA") else None
    return bool(colours) and all(red == green == blue for _, (red, green, blue) in colours)


def _look(table: datasets.Dataset, data: Data) -> tuple[int, int, int]:
    """(C, H, W) of a data set from the headers of its first images and what the user asks for."""
    grey, sizes = True, []
    for row in range(min(LOOKED_AT, len(table))):
        image = table[row]["image"]
        try:
            with Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as picture:
                upright = picture.getexif().get(0x0112, 1) < 5
                sizes.append(picture.size[:: 1 if upright else -1])
                grey &= picture.mode in ("1", "L", "LA", "F") or picture.mode[0] == "I" or _grey_palette(picture)
        except Exception:
            continue
    if not sizes and data.size is None:
        raise Refused(f"--data {data.source}: none of the first {LOOKED_AT} images can be read")
    width, height = (data.size, data.size) if data.size else sizes[0]
    return data.channels or (1 if grey else 3), height, width


# -- sources ---------------------------------------------------------------------------------------


def open_data(data: Data, seed: int) -> Source:
    """Find the images that `data` names and their held-out part.

    Raises:
        Refused: there is nothing there, or no images in it.
    """
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    splits = {name: table for name, table in _splits(data.source).items() if len(table)}
    if not splits:
        raise Refused(f"--data {data.source}: there are no images in it")
    train_name = "train" if "train" in splits else next(iter(splits))
    test_name = next((name for name in TEST_SPLITS if name in splits and name != train_name), None)
    train, classes = _columns(splits[train_name], data.source)
    rows = np.arange(len(train))
    if test_name:
        test = _columns(splits[test_name], data.source)[0]
        chosen = np.arange(len(test))
        if len(test) > data.held_out:
            chosen = np.sort(torch.randperm(len(test), generator=generator(0)).numpy()[: data.held_out])
    else:
        if len(train) < 2:
            raise Refused(f"--data {data.source}: one image is not enough, one at least is held out for evaluation")
        test, test_name = train, train_name
        order = torch.randperm(len(train), generator=generator(0)).numpy()
        chosen, rows = np.split(order, [max(1, min(data.held_out, len(train) // 10))])
        chosen, rows = np.sort(chosen), np.sort(rows)
    shape = _look(train, data)
    return Source(
        Images(train, rows, shape, data, seed, f"{data.source}, {train_name}"),
        Images(test, chosen, shape, data, seed, f"{data.source}, {test_name}"),
        shape,
        classes,
    )


def _splits(source: str) -> dict[str, Any]:
    """The tables of a data set by split."""
    load: Any = datasets.load_dataset
    path = EMBEDDED.get(source, Path(source).expanduser())
    try:
        if path.is_file():
            if path.suffix != ".parquet":
                raise Refused(f"--data {source}: a file must be a parquet file, or give a folder of images")
            return {"train": load("parquet", data_files=str(path), split="train")}
        if path.is_dir():
            if any(path.rglob("*.parquet")):
                return {str(name): table for name, table in load("parquet", data_dir=str(path)).items()}
            return _folder(path)
        if source.startswith((".", "/", "~")) or source.count("/") > 1 or not source:
            raise Refused(f"--data {source}: there is no such file or folder")
        _ask_hub(source)
        return {str(name): table for name, table in load(source).items()}
    except Refused:
        raise
    except Exception as error:  # whatever arrow or the hub has to say
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise Refused(f"--data {source}: reading it failed with {said}") from None


def _ask_hub(name: str) -> None:
    """Ask once whether there is such a data set; `load_dataset` would try six times before it says so."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:  # what is in the cache must do
        return
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
    except (huggingface_hub.errors.RepositoryNotFoundError, huggingface_hub.errors.HFValidationError):
        raise Refused(f"--data {name}: there is no file or folder of that name, nor a Hugging Face data set") from None
    except Exception as error:  # no network, or not to there
        raise Refused(
            f"--data {name}: there is no file or folder of that name, and Hugging Face can't be asked "
            f"({type(error).__name__}: {error}); HF_HUB_OFFLINE=1 reads a data set that is in its cache"
        ) from None


def _folder(root: Path) -> dict[str, datasets.Dataset]:
    """The images below a folder, in the order of their names; their class is their first folder's name."""
    below = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    if "train" in below:
        roots = {name: path for name, path in below.items() if name in ("train", *TEST_SPLITS)}
    else:
        roots = {"train": root}
    found = {split: sorted(_images_below(path)) for split, path in roots.items()}
    parts = {split: [path.relative_to(roots[split]).parts for path in paths] for split, paths in found.items()}
    names = sorted({part[0] for part in parts["train"] if len(part) > 1})
    number = {name: n for n, name in enumerate(names)}
    tables = {}
    for split, paths in found.items():
        label = [number.get(part[0], -1) if len(part) > 1 else -1 for part in parts[split]]
        features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
        columns = {"image": [str(path) for path in paths], "label": label}
        tables[split] = datasets.Dataset.from_dict(columns, features=features)
    return tables


def _images_below(root: Path) -> Iterator[Path]:
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in files:
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(folder, name)


def _columns(table: datasets.Dataset, source: str) -> tuple[datasets.Dataset, int]:
    """The table with just "image" (encoded) and "label" (-1: none), and the number of classes."""
    features = table.features
    image = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
    image = image or next((name for name in ("image", "img", "png", "jpg") if name in features), None)
    if image is None:
        raise Refused(f"--data {source}: no column holds images; its columns are {', '.join(features)}")
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels += [
        name for name in ("label", "labels", "class", "cls") if name in features and features[name].dtype == "int64"
    ]
    table = table.select_columns([image, *labels[:1]])
    table = table.rename_columns({image: "image"} | ({labels[0]: "label"} if labels else {}))
    if not labels:
        table = table.add_column("label", np.full(len(table), -1))
    kind = table.features["label"]
    classes = len(kind.names) if isinstance(kind, datasets.ClassLabel) else int(max(table["label"])) + 1
    return table.cast_column("image", datasets.Image(decode=False)), classes
