"""Which column of a table holds the images, which one the labels, and what a label's values mean."""

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from pyarrow import parquet

from pretrain.core.errors import UserError
from pretrain.core.text import listed, printable
from pretrain.data.splits import class_key, split_of

IMAGES = ("image", "img", "png", "jpg", "jpeg", "picture", "photo", "pixels", "pixel_values", "images")
SPLITS = ("split", "subset", "partition", "set", "fold", "usage")  # columns that may name a row's split
LABELS = ("label", "labels", "class", "cls", "target", "category")  # columns that name a class
FILES = ("file_name", "filename", "file", "path", "image")  # columns of metadata that name a file


def _nesting(feature: Any) -> tuple[int, str]:
    """How deep a column's lists are nested, and the type of what is in them."""
    depth = 0
    if hasattr(feature, "shape") and hasattr(feature, "dtype"):  # Array2D and its like
        return len(feature.shape), feature.dtype
    while not isinstance(feature, (datasets.Value, dict)) and (inner := getattr(feature, "feature", None)) is not None:
        feature, depth = inner, depth + 1
    return depth, feature.dtype if isinstance(feature, datasets.Value) else ""


def _is_array(feature: Any) -> bool:
    depth, dtype = _nesting(feature)
    return depth in (2, 3) and dtype.startswith(("int", "uint", "float", "bool"))


def _is_encoded(feature: Any) -> bool:
    """Whether a column holds encoded images as other programs write them: bytes, or bytes and path."""
    if isinstance(feature, dict):
        return "bytes" in feature and {*feature} <= {"bytes", "path"}
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def array_type(feature: Any) -> str:
    """The type of the values of a column of arrays; "" for encoded images."""
    return _nesting(feature)[1] if _is_array(feature) else ""


def _described(feature: Any) -> str:
    """What a column holds, for messages."""
    if isinstance(feature, dict):
        return f"fields {', '.join(feature)}"
    if (inner := getattr(feature, "feature", None)) is not None:
        return f"list of {_described(inner)}"
    return str(feature.dtype) if isinstance(feature, datasets.Value) else type(feature).__name__


def image_column(features: datasets.Features, asked: str | None, source: str) -> str:
    """The name of the column of images.

    Args:
        features: of the table.
        asked: --data.image, or None.
        source: the value of --data, for messages.

    Raises:
        UserError: there is none, or several and none is called image.
    """
    columns = printable(", ".join(features))
    named = [name for name in IMAGES for column in features if column.lower() == name for name in (column,)]
    if asked is not None:
        if asked not in features:
            raise UserError(f"--data.image {asked}: {source} has no such column; its columns are {columns}")
        return asked
    usable = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    others = [name for name, kind in features.items() if _is_array(kind) or _is_encoded(kind)]
    others += [name for name in named if getattr(features[name], "dtype", "") in ("string", "large_string")]  # paths
    usable = usable or [name for name in others if name in named] or others
    if not usable:
        held = [f"{name} ({_described(kind)})" for name, kind in features.items()]
        flat = [name for name in named if _nesting(features[name])[0] and _nesting(features[name])[1]]
        said = f", and the lists of {flat[0]} have no height and width" if flat else ""
        raise UserError(f"--data {source}: no column holds images{said}; its columns are {listed(held)}")
    chosen = min(usable, key=lambda name: (name != "image", name.lower() != "image"))
    if len(usable) > 1 and chosen.lower() != "image":
        raise UserError(
            f"--data {source}: several columns hold images, {printable(', '.join(usable))}; name one with --data.image"
        )
    return chosen


def note_split_columns(columns: Mapping[str, Sequence[Any]], note: Callable[[str], None]) -> None:
    """Report columns, by name, whose values are names of splits: what they hold out is trained on."""
    for name, values in columns.items():
        counts = Counter(map(str, values)) if name.lower() in SPLITS else Counter()
        if {split_of(value) for value in counts} & {"validation", "test"}:
            said = listed([f"{value} {count:,}" for value, count in counts.items()])
            note(
                f"all rows are used, whatever split column {name} gives them ({said}); write each into a file or folder"
            )


def label_column(
    features: datasets.Features, asked: str | None, source: str, note: Callable[[str], None]
) -> str | None:
    """The name of the column of labels, None if there is none; see `image_column`."""
    if asked is not None:
        if asked not in features:
            columns = printable(", ".join(features))
            raise UserError(f"--data.label {asked}: {source} has no such column; its columns are {columns}")
        if not isinstance(features[asked], (datasets.Value, datasets.ClassLabel)):
            raise UserError(f"--data.label {asked}: it holds {type(features[asked]).__name__}, and classes can be used")
        return asked
    found = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    for label in LABELS:
        for name, kind in sorted(features.items(), key=lambda item: item[0] != label):
            if name.lower() == label and isinstance(kind, datasets.Value):
                found.append(name)
            elif name.lower() == label and not isinstance(kind, datasets.ClassLabel):
                note(f"column {name} holds no classes, but {_described(kind)}")
    if len(found) > 1:
        note(f"labels are taken from {found[0]}, not from {', '.join(found[1:])} (--data.label)")
    return found[0] if found else None


def image_table(table: datasets.Dataset, column: str, label: Sequence[int] | np.ndarray) -> datasets.Dataset:
    """The table with the columns "image" (encoded, or an array) and "label" alone."""
    table = table.select_columns([column])
    if column != "image":
        table = table.rename_column(column, "image")
    is_array = _is_array(table.features["image"])
    if not is_array:
        try:
            table = table.cast_column("image", datasets.Image(decode=False))
        except Exception as error:  # arrow raises exceptions of many types
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(
                f"column {printable(column)} can't be read as images ({said}); name one with --data.image"
            ) from None
    table = table.add_column("label", np.asarray(label, np.int64))
    return table.with_format("numpy") if is_array else table


def label_values(table: datasets.Dataset, column: str) -> tuple[list[Any], list[str] | None]:
    """Each row's class, None where it has none, and the classes if the column's type names them.

    No label are None, NaN, a blank string, and -1 of numbers.

    Raises:
        UserError: a number has no name in the column's type.
    """
    kind, values = table.features[column], list(table[column])
    if isinstance(kind, datasets.ClassLabel):
        if (largest := max((value for value in values if value is not None), default=-1)) >= len(kind.names):
            raise UserError(
                f"column {printable(column)} has the class {largest}, and its type has the names of {len(kind.names)}; "
                "correct it, or name another column with --data.label"
            )
        return [kind.names[value] if value is not None and value >= 0 else None for value in values], kind.names
    return without_missing(values), None


def without_missing(values: Iterable[Any]) -> list[Any]:
    """Values with None where there is no label."""
    return [
        None
        if value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and math.isnan(value))
        or value == -1
        else value
        for value in values
    ]


def class_name(value: Any) -> str:
    """The name of the class that a label's value stands for; 3.0 is 3."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def class_names(values: Iterable[Any]) -> list[str]:
    """The names of the classes among values, sorted by value."""
    found = {*values} - {None}
    kinds = {type(value) for value in found}
    return [*dict.fromkeys(map(class_name, sorted(found, key=str if len(kinds) > 1 else None)))]


def match(values: Sequence[Any], names: list[str], note: Callable[[str], None]) -> np.ndarray:
    """The number of each value's class in the training data, int64, -1 where that has no such class.

    Names are compared as they are, else without the case of their letters and spaces around them.

    Args:
        values: a label per image, None where there is none.
        names: of the training data's classes.
        note: called with messages for what does not match exactly.
    """
    exact = {name: number for number, name in enumerate(names)}
    counts = Counter(class_key(name) for name in names)
    loose = {class_key(name): number for name, number in exact.items() if counts[class_key(name)] == 1}
    number_of: dict[Any, int] = {None: -1}
    spelled, unknown = [], Counter[str]()
    for value, count in Counter(values).items():
        if value is None:
            continue
        name = class_name(value)
        number_of[value] = exact.get(name, loose.get(class_key(name), -1))
        if number_of[value] < 0:
            unknown[name] += count
        elif name not in exact:
            spelled.append(f"{name} as {names[number_of[value]]}")
    if spelled:
        note(f"classes that are spelled otherwise in the training data: {listed(spelled)}")
    if unknown:
        said = listed([f"{name} {count:,}" for name, count in unknown.items()])
        note(
            f"{unknown.total():,} images are of classes that the training data does not have, and count as unlabelled: "
            f"{said}"
        )
    return np.array([number_of[value] for value in values], np.int64)


def read_metadata(path: str) -> list[dict[str, Any]]:
    """The rows of a metadata.csv, .jsonl or .parquet.

    Raises:
        UserError: it can't be read.
    """
    try:
        if path.lower().endswith(".csv"):
            with Path(path).open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                names = [*(reader.fieldnames or ())]
                if twice := {name for name in names if names.count(name) > 1}:
                    raise ValueError(f"it has several columns {', '.join(sorted(twice))}")
                return [*reader]
        if path.lower().endswith(".jsonl"):
            with Path(path).open(encoding="utf-8") as file:
                rows = [json.loads(line) for line in file if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("not all of its lines are objects")
            return rows
        return parquet.read_table(path).to_pylist()
    except (OSError, ValueError, csv.Error, RecursionError, pa.ArrowException) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{printable(path)} can't be read: {said}; repair it, or move it away") from None


def metadata_labels(paths: Sequence[str], asked: str | None, note: Callable[[str], None]) -> dict[str, Any]:
    """The label of each image that metadata files list, by path.

    Args:
        paths: of the files.
        asked: --data.label, or None.
        note: called with messages for what is not used.

    Raises:
        UserError: a file can't be read, or an image has two labels.
    """
    found: dict[str, Any] = {}
    for path in sorted(paths):
        rows = read_metadata(path)
        columns = [*dict.fromkeys(name for row in rows for name in row if isinstance(name, str))]
        file = next((name for known in FILES for name in columns if name.lower() == known), None)
        labels = [name for known in LABELS for name in columns if name.lower() == known]
        label = asked if asked in columns else labels[0] if labels and asked is None else None
        short = printable(os.path.basename(path))  # noqa: PTH119
        if file is None or label is None:
            missing = "file_name" if file is None else asked or "label"
            said = f"no column {missing}, but {listed(columns)} (--data.label)" if rows else "no rows"
            note(f"{short} is not used: it has {said}")
            continue
        unused = [name for name in columns if name.strip() and name not in (file, label)]
        if unused:
            note(f"columns of {short} that are not used: {listed(unused)}")
            note_split_columns({name: [row.get(name) for row in rows] for name in unused}, note)
        for row, value in zip(rows, plain([row.get(label) for row in rows], f"{label} of {short}", note), strict=True):
            name = str(row.get(file))
            where = os.path.normpath(os.path.join(os.path.dirname(path), name))  # noqa: PTH118, PTH120
            if found.setdefault(where, value) != value:
                raise UserError(
                    f"{printable(path)}: the labels of {printable(name)} are {printable(str(found[where]))} and "
                    f"{printable(str(value))}; correct it, or move the file away"
                )
    return found


def plain(values: list[Any], column: str, note: Callable[[str], None]) -> list[Any]:
    """Labels that can be classes, the others as None; if a text file's are numbers and fractions, as numbers."""
    if others := sum(not isinstance(value, (str, int, float, bool, type(None))) for value in values):
        note(f"{others:,} values of {printable(column)} are no classes, but lists or the like, and are not used")
        return [value if isinstance(value, (str, int, float, bool)) else None for value in values]
    filled = [value for value in values if value not in (None, "")]
    if filled and all(isinstance(value, str) for value in filled):
        try:
            numbers = [*map(float, filled)]
        except ValueError:
            return values
        if not all(math.isnan(number) or number.is_integer() for number in numbers):
            return [None if value in (None, "") else float(value) for value in values]
    return values
