"""Finding the parts of a data set: folders of images, parquet and tar files, saved data sets, the Hugging Face hub."""

import glob
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
from datasets import config as cache
from datasets.exceptions import DatasetGenerationError
from datasets.table import InMemoryTable
from huggingface_hub.utils import validate_repo_id
from pyarrow import parquet

from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.core.files import expand, read_json
from pretrain.core.text import listed, printable
from pretrain.data.files import SAVED_SPLITS, Node, Scan, scan, to_text
from pretrain.data.report import Report
from pretrain.data.shards import filled_shards
from pretrain.data.splits import EVERYTHING, NONE, WHOLE, Split, Splitter, split_of
from pretrain.data.tables import (
    SPLITS,
    image_column,
    image_table,
    label_column,
    label_values,
    metadata_labels,
    note_split_columns,
    without_missing,
)
from pretrain.data.tars import COMPRESSED, RANGE, expand_pattern, image_of, labels_of, read_samples, tar_table

EMBEDDED = {"fashion-mnist": Path(__file__).parent / "fashion_mnist"}
FEATURES = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
TRIED = 8  # parquet files among images whose columns are looked at


@dataclass
class Part:
    """The images of one split.

    Attributes:
        name: of the split.
        values: the label of each image, None where there is none.
        given: the names of all classes, if the column's type has them.
        folders: where files that a table names must lie; None: anywhere.
        images: where images are from, for the report.
        labels: where labels are from, for the report.
        table: makes the table of images (see `Images`) with these labels, int64 [N].
        shards: the tar files in which its images lie.
    """

    name: str
    values: Sequence[Any]
    given: list[str] | None
    folders: tuple[str, ...] | None
    images: str
    labels: str
    table: Callable[[np.ndarray], datasets.Dataset] = lambda label: datasets.Dataset.from_dict({})
    shards: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)


def find_parts(data: Data, report: Report) -> list[Part]:
    """The splits of a data set: first the one to train on, then those to evaluate on, the preferred one first.

    Args:
        data: the settings.
        report: gets what is not used.

    Raises:
        UserError: there are none, they can't be read, or what is meant is ambiguous.
    """
    source, path = data.source, EMBEDDED.get(data.source, expand(data.source))
    try:
        if path.is_file():
            root = Node(str(path.parent), [path.name], total=1)
            if path.suffix.lower() not in (".parquet", ".tar"):
                packed = "; unpack it, as images are read at their place in a tar" * bool(COMPRESSED.search(path.name))
                raise UserError(
                    f"--data {source}: a file must be a parquet file or a tar file, or give a folder of images{packed}"
                )
            return (_parquet_parts if path.suffix.lower() == ".parquet" else _tar_parts)(root, data, report)
        if path.is_dir():
            found = scan(path)
            report.passed_over = found.passed_over
            if source in EMBEDDED:
                found.passed_over.clear()
            return _folder_parts(found, data, report)
        if RANGE.search(source):
            return _tar_parts(_of_pattern(source), data, report)
        if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1 or not source:
            raise UserError(f"--data {source}: there is no such file or folder")
        _ask_hub(source)
        caches = str(cache.HF_CACHE_HOME), str(cache.HF_DATASETS_CACHE), huggingface_hub.constants.HF_HUB_CACHE
        load: Any = datasets.load_dataset
        return _named_parts({str(name): table for name, table in load(source).items()}, caches, data, report)
    except UserError:
        raise
    except Exception as error:  # arrow and the hub raise exceptions of many types
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        said = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
        if not path.exists():
            raise UserError(
                f"--data {source}: there is no such file or folder, and loading it from Hugging Face failed with {said}"
            ) from None
        raise UserError(f"--data {source}: reading it failed with {said}") from None


def _of_pattern(source: str) -> Node:
    """The tar files of `FOLDER/train-{000..012}.tar`.

    Raises:
        UserError: one of them is missing, or they are no tar files of one folder.
    """
    folder, name = expand(source).parent, Path(source).name
    if RANGE.search(str(folder)) or not name.lower().endswith(".tar"):
        raise UserError(f"--data {source}: {{FIRST..LAST}} must stand in the name of tar files of one folder")
    names = expand_pattern(name)
    if missing := [each for each in names if not (folder / each).is_file()]:
        raise UserError(f"--data {source}: there are no files {listed(missing)}")
    return Node(str(folder), names, total=len(names))


def _ask_hub(name: str) -> None:
    """Raise if the hub has no such data set; `load_dataset` would retry six times first.

    Raises:
        UserError: there is no such data set, or the hub can't be reached.
    """
    try:
        validate_repo_id(name)  # also of what is in the local cache: a/.. is a path
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            return
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


def _folder_parts(found: Scan, data: Data, report: Report) -> list[Part]:
    """Those of a folder of images or of parquet files."""
    images, tables, tars = found.images, found.tables, found.tars
    if tars.total and (found.saved or images.total):  # which were unpacked of them, it may be
        found.passed_over[".tar file"] += tars.total
        tars = Node(tars.path)
    if found.saved:
        beside = images.total + tables.total
        if found.saved == [images.path] and beside:  # its rows may name them
            found.passed_over["image or .parquet file beside the saved data set"] += beside
        elif beside:
            kind = f"{images.total:,} image files" if images.total else f"{tables.total:,} parquet files"
            raise UserError(
                f"--data {data.source}: it holds {kind} and the saved data set {found.saved[0]}; name the one that is "
                "meant, or move the other away"
            )
        return _saved_parts(found.saved, images.path, data, report)
    if not images.total and not tables.total and not tars.total:
        others = listed([f"{kind} {count:,}" for kind, count in found.passed_over.most_common()])
        others = f"; passed over: {others}" if others else ""
        packed = any(kind.removesuffix(" file") in ARCHIVES for kind in found.passed_over)
        raise UserError(
            f"--data {data.source}: there are no images in it{others}"
            + packed * "; archives have to be unpacked, except for uncompressed tar files"
        )
    for what, names in (
        ("folders without images", found.empty),
        ("folders taken for hidden ones by their names", sorted(found.hidden)),
        ("links to folders that are read under another name", sorted(found.linked)),
    ):
        if names:
            report.note(f"{what}: {listed(names)}")
    empty = [name.rpartition("/")[2] for name in found.empty]
    if not images.total:
        return _parquet_parts(tables, data, report, empty) if not tars.total else _beside_tables(found, data, report)
    if tables.total:
        with_images = {node.path for node in images.nodes()} - {images.path}
        unclear = (
            f"{node.path}/{name}"
            for node in tables.nodes()
            if node.path not in with_images
            for name in sorted(node.files)
        )
        for file in itertools.islice(unclear, TRIED):
            if _holds_images(file):
                raise UserError(
                    f"--data {data.source}: it holds {images.total:,} image files and the parquet file {file}; name "
                    "the one that is meant, or move the other away"
                )
        found.passed_over[".parquet file"] += tables.total
    if data.image is not None:
        raise UserError(f"--data.image {data.image}: {data.source} is a folder of images and has no columns")
    splitter = Splitter(images, data.source, report.note, empty=empty)
    splits = splitter.splits(data.train_split, data.test_split)
    return _with_metadata(splits, found.metadata, data, report)


def _beside_tables(found: Scan, data: Data, report: Report) -> list[Part]:
    """The parts of a folder of tar files, in which parquet files may lie that describe them."""
    files = [f"{node.path}/{name}" for node in found.tables.nodes() for name in sorted(node.files)]
    for file in files[:TRIED]:
        if _holds_images(file):
            raise UserError(
                f"--data {data.source}: it holds {found.tars.total:,} tar files and the parquet file {file}; name the "
                "one that is meant, or move the other away"
            )
    found.passed_over[".parquet file"] += len(files)
    found.passed_over["metadata file"] += len(found.metadata)
    found.passed_over = report.passed_over = +found.passed_over
    if packed := sum(count for kind, count in found.passed_over.items() if kind in (".gz file", ".tgz file")):
        report.note(f"{packed:,} compressed files beside the tar files are not used; unpacked, they would be (gunzip)")
    return _tar_parts(found.tars, data, report, [name.rpartition("/")[2] for name in found.empty])


def _tar_parts(root: Node, data: Data, report: Report, empty: Sequence[str] = ()) -> list[Part]:
    """Those of WebDataset's tar files."""
    splits = Splitter(root, data.source, report.note, "tar files", empty).splits(data.train_split, data.test_split)
    parts: list[Part] = []
    for split in splits:
        source = f"{data.source}, {split.name}" if parts else data.source
        samples = read_samples(split.files, root.path, data.source, report.note, report.passed_over)
        if not len(samples) and not parts:
            raise UserError(f"--data {source}: the tar files to train on ({printable(split.name)}) have no samples")
        if not len(samples):
            continue
        asked = data.image, data.label
        if parts:  # those to evaluate on may have other files
            image, label = data.image, data.label
            has_label = label in samples.columns or "json" in samples.columns
            asked = image if image in samples.columns else None, label if has_label else None
        image, images = image_of(samples, asked[0], source, report.note)
        values, labels, read = labels_of(samples, asked[1], source, report.note)
        unused = [f".{name} {column.shape[1]:,}" for name, column in samples.columns.items()]
        used = {*images.split(", "), f".{read}"}
        if unused := [text for text in unused if text.split()[0] not in used]:
            report.note(f"files of samples that are not used: {listed(unused)}")
        parts.append(
            Part(
                split.name,
                [values[row] for row in image[0]],
                None,
                None,
                f"{images} files in {len(samples.files):,} tar file{'s' * (len(samples.files) > 1)}",
                labels,
                lambda label, samples=samples, image=image: tar_table(samples, image, label),
                tuple(samples.files),
            )
        )
    return parts


def _holds_images(path: str) -> bool:
    """Whether a parquet file has a column of images."""
    try:
        features = datasets.Features.from_arrow_schema(parquet.read_schema(path))
        return bool(image_column(features, None, path))
    except UserError as refusal:
        return "several columns" in str(refusal)
    except Exception:  # it is damaged, or no parquet file
        return False


def _with_metadata(splits: list[Split], metadata: list[str], data: Data, report: Report) -> list[Part]:
    """The parts of a folder of images, with the labels of metadata files, where there are some."""
    labels = metadata_labels(metadata, data.label, report.note)
    files = {file for split in splits for file in split.files} if labels else set()
    listed_files = files & labels.keys()
    if labels and len(listed_files) < len(labels):
        report.note(f"metadata lists {len(labels) - len(listed_files):,} files that are not among the images")
    if data.label is not None and not listed_files:
        raise UserError(
            f"--data.label {data.label}: {data.source} is a folder of images, and no metadata.csv, .jsonl or .parquet "
            "in it has columns file_name and that one"
        )
    if listed_files and any(split.classes.count(None) < len(split.classes) for split in splits):
        report.note("labels are those of the metadata, not the names of the folders")
    if listed_files and len(listed_files) < len(files):
        report.note(f"metadata does not list {len(files) - len(listed_files):,} images, which have no label")
    parts = []
    for split in (split for split in splits if split.files):
        values: list[Any] = without_missing(map(labels.get, split.files)) if listed_files else split.classes
        where = "metadata" if listed_files else "folders"
        parts.append(Part(split.name, values, None, None, "", where, lambda label, s=split: _paths(s.files, label)))
    return parts


def _paths(files: list[str], label: np.ndarray) -> datasets.Dataset:
    """The table of image files."""
    path = pa.array(map(to_text, files), pa.string(), size=len(files))
    image = pa.StructArray.from_arrays([pa.nulls(len(files), pa.binary()), path], ["bytes", "path"])
    table = pa.table({"image": image, "label": pa.array(label)})
    return datasets.Dataset(InMemoryTable(table), datasets.DatasetInfo(features=FEATURES))


def _parquet_parts(root: Node, data: Data, report: Report, empty: Sequence[str] = ()) -> list[Part]:
    load: Any = datasets.load_dataset
    splitter = Splitter(root, data.source, report.note, "parquet files", empty)
    splits = splitter.splits(data.train_split, data.test_split)
    parts = []
    for split in splits:
        files = filled_shards(split.files, data.source, report.note)
        if not files and split is splits[0]:
            raise UserError(
                f"--data {data.source}: the parquet files to train on ({printable(split.name)}) have no rows"
            )
        if files:
            table = load("parquet", data_files=[glob.escape(file) for file in files], split="train")
            folders = str(Path(files[0]).parent), root.path
            parts.append(_table_part(split.name, table, folders, data, report, parts[:1]))
    return parts


def _table_part(
    name: str, table: Any, folders: tuple[str, ...], data: Data, report: Report, before: Sequence[Part]
) -> Part:
    """A part from a table with a column of images.

    Args:
        name: of the split.
        table: its rows.
        folders: where files that it names must lie.
        data: the settings.
        report: gets what is not used.
        before: the part to train on, if this one is to be evaluated on: its columns may have other names.
    """
    source, features = data.source, table.features
    if before:
        source = f"{source}, {name}"
        image, label = (asked if asked in features else None for asked in (data.image, data.label))
        data = replace(data, image=image, label=label)
    image = image_column(features, data.image, source)
    label = label_column(features, data.label, source, report.note)
    if not before and (unused := [column for column in features if column not in (image, label)]):
        report.note(f"columns that are not used: {listed(unused)}")
        kinds = (datasets.Value, datasets.ClassLabel)
        splits = [column for column in unused if column.lower() in SPLITS and isinstance(features[column], kinds)]
        note_split_columns({column: label_values(table, column)[0] for column in splits}, report.note)
    values, given = label_values(table, label) if label else ([None] * len(table), None)
    labels = f"column {label}" if label else ""
    return Part(
        name, values, given, folders, f"column {image}", labels, lambda number: image_table(table, image, number)
    )


def _saved_parts(folders: list[str], root: str, data: Data, report: Report) -> list[Part]:
    """Those of data sets that `save_to_disk` wrote: of one `DatasetDict`, or of a `Dataset` in each folder."""
    if len(folders) == 1:
        if folders[0] != root:
            report.note(f"the data set is {folders[0][len(root) + 1 :]}/, as `save_to_disk` wrote it")
        loaded = _load_saved(folders[0])
        tables = loaded if isinstance(loaded, datasets.DatasetDict) else {EVERYTHING: loaded}
    else:
        tables = {folder[len(root) + 1 :]: _load_saved(folder) for folder in folders}
        if any(isinstance(table, datasets.DatasetDict) for table in tables.values()):
            raise UserError(f"--data {data.source}: it holds several saved data sets: {listed([*tables])}; name one")
    plain = {str(name): table.with_format(None) for name, table in tables.items()}
    return _named_parts(plain, (*folders, root), data, report)


def _load_saved(folder: str) -> Any:
    """The `Dataset` or `DatasetDict` in a folder.

    Raises:
        ValueError: it names files elsewhere, or that are not regular files.
    """
    is_dict = (Path(folder) / SAVED_SPLITS).is_file()
    loaded = {}
    for part in read_json(Path(folder) / SAVED_SPLITS)["splits"] if is_dict else [""]:
        files = read_json(Path(folder) / part / "state.json")["_data_files"]
        for file in files:
            path = Path(folder) / part / file["filename"]
            if {part, file["filename"]} & {".", ".."} or "/" in part + file["filename"] or not path.is_file():
                raise ValueError(f"{path} is not a regular file of the data set")  # a pipe would be waited for
        # `load_from_disk` can't open what has no rows and so no file.
        loaded[part] = datasets.load_from_disk(str(Path(folder) / part)) if files else datasets.Dataset.from_dict({})
    return datasets.DatasetDict(loaded) if is_dict else loaded[""]


def _named_parts(tables: dict[str, Any], folders: tuple[str, ...], data: Data, report: Report) -> list[Part]:
    """The parts of a data set whose splits have names.

    Args:
        tables: by name of the split.
        folders: where files that a table names must lie.
        data: the settings.
        report: gets what is not used.

    Raises:
        UserError: there is no such split, or which one is to be trained on is unclear.
    """
    chosen = _chosen_splits(tables, data)
    if empty := [name for name in tables if not len(tables[name])]:
        report.note(f"splits without rows: {listed(empty)}")
    chosen = [[name for name in names if name not in empty] for names in chosen]
    if not chosen[0]:
        raise UserError(
            f"--data {data.source}: there are no images in the split to train on; its splits are {listed([*tables])}"
        )
    chosen = [names for names in chosen if names]
    used = {name for names in chosen for name in names}
    if left := [f"{name} ({len(tables[name]):,} rows)" for name in tables if name not in (*used, *empty)]:
        report.note(f"splits that are not used: {listed(left)}")
    parts = []
    for names in chosen:
        table = tables[names[0]] if len(names) == 1 else datasets.concatenate_datasets([tables[name] for name in names])
        parts.append(_table_part("+".join(names), table, folders, data, report, parts[:1]))
    return parts


def _chosen_splits(tables: dict[str, Any], data: Data) -> list[list[str]]:
    """The names of the splits to train on, which are joined, then of those of each split to evaluate on."""

    def named(setting: str, value: str) -> list[str]:
        names = [value] if value in tables else value.split("+")
        if not {*names} <= {*tables}:
            raise UserError(f"--data.{setting}-split {value}: the splits of {data.source} are {listed([*tables])}")
        return names

    test = named("test", data.test_split) if data.test_split not in (None, NONE) else []
    if data.train_split == WHOLE:
        train = [name for name in tables if name not in test]
    elif data.train_split is not None:
        train = named("train", data.train_split)
    else:
        train = ["train"] if "train" in tables else [name for name in tables if split_of(name) == "train"]
        train = train if len(train) == 1 else [*tables] if len(tables) == 1 else []
    if not train:
        raise UserError(
            f"--data {data.source}: which of its splits is to be trained on is unclear: {listed([*tables])}; name it "
            "with --data.train-split"
        )
    if {*train} & {*test}:
        raise UserError(f"--data.test-split {data.test_split}: it would be trained on, too; name another one")
    if test or data.train_split == WHOLE:
        return [train, test] if test else [train]
    others = [name for name in tables if name not in train and split_of(name) in ("validation", "test")]
    return [train, *([name] for name in sorted(others, key=lambda name: split_of(name) != "test"))]
