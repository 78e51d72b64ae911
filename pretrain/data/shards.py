"""Files that make one table: whether they can be read, are complete, and, of parquet files, have the same columns."""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import pyarrow as pa
from pyarrow import parquet

from pretrain.core.errors import UserError
from pretrain.core.text import listed, printable

LFS = b"version https://git-lfs"  # how a file begins that stands for one that was not downloaded
NUMBERED = re.compile(r"(.*?)(\d+)-of-(\d+)(?!\d)")  # of a shard's name: what is before, number, number of shards
PLAIN = re.compile(r"(.*?)(\d+)(\.\w+)")  # of a numbered file's name: what is before, number, extension


def filled_shards(files: Sequence[str], source: str, note: Callable[[str], None]) -> list[str]:
    """Those of a split's files that have rows.

    Args:
        files: paths.
        source: the value of --data, for messages.
        note: called with messages on files that have no rows or are missing.

    Raises:
        UserError: a file can't be read, or its columns are not those of the first one.
    """
    filled, empty = [], []
    first: tuple[str, pa.Schema] | None = None
    for file in files:
        rows, schema = _footer(file, source)
        if not rows:
            empty.append(short_name(file))
            continue
        filled.append(file)
        if first is None:
            first = file, schema
        elif difference := _difference(schema, first[1]):
            raise UserError(
                f"--data {source}: {short_name(file)} and {short_name(first[0])} are no parts of one table, "
                f"{difference}; name the files that are meant with --data.train-split and --data.test-split"
            )
    if empty:
        note(f"files without rows: {listed(empty)}")
    note_numbers(files, source, note)
    return filled


def note_numbers(files: Sequence[str], source: str, note: Callable[[str], None]) -> None:
    """Report shards that are missing by the others' numbers, `-00001-of-00003`.

    Raises:
        UserError: there are shards of two totals.
    """
    numbers = _numbers(files)
    for prefix, total, _ in numbers:
        if others := [other for start, other, _ in numbers if start == prefix and other != total]:
            raise UserError(
                f"--data {source}: {printable(prefix)} has shards of {total} and of {listed(others)} files, as if it "
                "was written twice; move those away that are not meant"
            )
    if missing := _missing(numbers):
        note(f"shards that are not among the files: {listed(missing)}")


def missing_numbers(files: Sequence[str]) -> list[str]:
    """The names that are missing among files that are numbered without a total: `train-000003.tar`.

    Numbers of which more are missing than there are stand for something else, and nothing is missing.
    """
    numbers: dict[tuple[str, str, int], set[int]] = defaultdict(set)
    for file in files:
        folder, name = os.path.split(file)
        if (found := PLAIN.fullmatch(name)) and not NUMBERED.match(name):
            before = f"{os.path.basename(folder)}/{found[1]}"  # noqa: PTH119
            numbers[before, found[3], len(found[2])].add(int(found[2]))
    missing = []
    for (before, after, digits), there in numbers.items():
        if max(there) - min(there) + 1 <= 2 * len(there):
            absent = (number for number in range(min(there), max(there)) if number not in there)
            missing += [f"{before}{number:0{digits}d}{after}" for number in absent]
    return missing


def short_name(file: str) -> str:
    """A file and its folder, for messages."""
    return printable("/".join(file.rsplit("/", 2)[-2:]))


def unreadable(file: str, source: str, said: str) -> UserError:
    """The error for a shard that can't be read, whose reader said why."""
    said = " ".join(said.split())
    try:
        with Path(file).open("rb") as stream:
            head = stream.read(len(LFS))
    except OSError:
        head = b"?"
    if head == LFS:
        said = "it is a pointer of Git LFS, and the file itself was not downloaded (git lfs pull)"
    elif not head:
        said = "it is empty"
    return UserError(f"--data {source}: {short_name(file)} can't be read: {said}; restore or remove it")


def _footer(file: str, source: str) -> tuple[int, pa.Schema]:
    """A file's number of rows, and its columns.

    Raises:
        UserError: it can't be read.
    """
    try:
        footer = parquet.read_metadata(file)
        schema = footer.schema.to_arrow_schema()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(file, source, str(error)) from None
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise UserError(f"--data {source}: {short_name(file)} can't be read: it has several columns {listed(twice)}")
    return footer.num_rows, schema


def _difference(schema: pa.Schema, first: pa.Schema) -> str:
    """What keeps a file's rows from being rows of the first file's table; "" if nothing does."""
    if {*schema.names} != {*first.names}:
        return f"their columns are {listed(schema.names)} and {listed(first.names)}"
    classes, others = _class_names(schema), _class_names(first)
    for name in first.names:
        one, other = schema.field(name).type, first.field(name).type
        if not (one == other or pa.types.is_null(one) or _kind(one) == _kind(other)):
            return f"their columns {printable(name)} hold {one} and {other}"
        if name in classes and name in others and classes[name] != others[name]:
            return (
                f"their columns {printable(name)} have the classes {listed(classes[name])} and {listed(others[name])}"
            )
    return ""


def _kind(kind: pa.DataType) -> str:
    """What types of columns have in common that can be read as one another."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    kinds = {
        "whole numbers": pa.types.is_integer,
        "fractions": pa.types.is_floating,
        "text": lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
        "bytes": lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind),
        "several values": pa.types.is_nested,
    }
    return next((name for name, holds in kinds.items() if holds(kind)), str(kind))


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The names of classes of the columns whose type has them."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    features = datasets.Features.from_arrow_schema(schema)
    return {name: kind.names for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}


def _numbers(files: Sequence[str]) -> dict[tuple[str, str, int], set[int]]:
    """The numbers of the shards that are there, by what is before in their names, how many there are, and digits."""
    numbers: dict[tuple[str, str, int], set[int]] = defaultdict(set)
    for file in files:
        folder, name = os.path.split(file)
        if found := NUMBERED.match(name):
            numbers[f"{os.path.basename(folder)}/{found[1]}", found[3], len(found[2])].add(int(found[2]))  # noqa: PTH119
    return numbers


def _missing(numbers: dict[tuple[str, str, int], set[int]]) -> list[str]:
    """The names of shards that are not there, from the numbers in the others' names."""
    missing = []
    for (prefix, total, digits), there in numbers.items():
        start = 1 if 0 not in there and int(total) in there else 0
        absent = (number for number in range(start, min(int(total), 10**5) + start) if number not in there)
        missing += [f"{prefix}{number:0{digits}d}-of-{total}" for number in absent]
    return missing
