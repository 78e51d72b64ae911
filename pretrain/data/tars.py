"""WebDataset's tar files as tables: a row for each sample, a column for each extension of its files.

A sample is the files of one tar whose names are the same up to the first dot of the last part: `0001.jpg`, `0001.cls`,
`0001.json`. Only headers and labels are read here; an image is read where it is used, at its place in the tar.
"""

import hashlib
import json
import re
import tarfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable
from huggingface_hub import cached_assets_path
from pyarrow import parquet

from pretrain.core.errors import UserError
from pretrain.core.files import atomic_write
from pretrain.core.text import listed, printable
from pretrain.data.files import SUFFIXES, from_text, to_text
from pretrain.data.shards import missing_numbers, note_numbers, short_name, unreadable
from pretrain.data.tables import LABELS, plain, without_missing

PACKED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz", b"(\xb5/\xfd": "unzstd"}  # by first bytes
COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz)$", re.IGNORECASE)  # names of compressed tars
NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)  # key and extension, as WebDataset splits a name
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
BLOCK = b"\0" * tarfile.BLOCKSIZE
MAX_LABEL = 1 << 20  # bytes of a file with a label
MAX_NAMED = 10**5  # files of a pattern with {000..999}
SLOW = 1.0  # seconds; an index that took longer to make is kept in the cache
VERSION = 1  # of kept indices
MEMBERS = pa.schema({"name": pa.string(), "kind": pa.string(), "offset": pa.int64(), "size": pa.int64()})
FEATURES = datasets.Features(
    {
        "image": {name: datasets.Value(kind) for name, kind in (("path", "large_string"), ("shard", "int32"))}
        | {name: datasets.Value("int64") for name in ("offset", "size")},
        "label": datasets.Value("int64"),
    }
)


def expand_pattern(pattern: str) -> list[str]:
    """The names of `train-{000..012}.tar`; digits are padded as the first number is.

    Raises:
        UserError: a range is empty, or there are too many names.
    """
    parts: list[list[str]] = []
    count = 1
    for position, text in enumerate(re.split(r"(\{\d+\.\.\d+\})", pattern)):
        found = RANGE.fullmatch(text) if position % 2 else None
        if found is None:
            parts.append([text])
            continue
        first, last = int(found[1]), int(found[2])
        count *= max(0, last - first + 1)
        if not 0 < count <= MAX_NAMED:
            raise UserError(f"--data {pattern}: {text} must be {{FIRST..LAST}}, of at most {MAX_NAMED:,} files in all")
        parts.append([f"{number:0{len(found[1])}d}" for number in range(first, last + 1)])
    return ["".join(words) for words in product(*parts)]


@dataclass
class Samples:
    """The samples of a split's tar files, N of them.

    Attributes:
        files: the tar files that have samples.
        keys: large_string [N]; file and key of each, relative to the data set.
        shard: int32 [N]; which of `files` each is in.
        columns: by extension; for the files of that extension the sample, the offset in the tar, and the size, int64
            [3, n].
    """

    files: list[str]
    keys: pa.ChunkedArray
    shard: np.ndarray
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.shard)

    def name_of(self, sample: int, column: str = "") -> str:
        """A sample, or its file of an extension, for messages."""
        name = from_text(str(self.keys[sample]))
        return printable(f"{name}.{column}" if column else name)


def read_samples(
    files: Sequence[str], root: str, source: str, note: Callable[[str], None], passed_over: Counter[str]
) -> Samples:
    """Index tar files, without reading what is in their files.

    Args:
        files: paths.
        root: folder that names are relative to.
        source: the value of --data, for messages.
        note: called with messages on files without samples, and on missing ones.
        passed_over: gets the number of members that are not used, by kind.

    Raises:
        UserError: a tar can't be read, or has two files of one name.
    """
    used, empty, keys, shards, columns = [], [], [], [], {}
    count = 0
    for file in files:
        found, at = _samples(_members(file, source), file, source, passed_over)
        if not found:
            empty.append(short_name(file))
            continue
        below = file[len(root) + 1 :] if file.startswith(f"{root}/") else file
        keys.append(pa.array([to_text(f"{below}/{key}") for key in found], pa.large_string()))
        shards.append(np.full(len(found), len(used), np.int32))
        for extension, members in at.items():
            members[0] += count
            columns.setdefault(extension, []).append(members)
        used.append(file)
        count += len(found)
    if empty:
        note(f"tar files without samples: {listed(empty)}")
    note_numbers(files, source, note)
    if missing := missing_numbers(files):
        note(f"tar files that are not among those numbered alike: {listed(missing)}")
    return Samples(
        used,
        pa.chunked_array(keys, pa.large_string()),
        np.concatenate([np.empty(0, np.int32), *shards]),
        {extension: np.concatenate(parts, axis=1) for extension, parts in sorted(columns.items())},
    )


def _samples(
    members: pa.Table, file: str, source: str, passed_over: Counter[str]
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The keys of a tar's samples in their order, and its columns, see `Samples.columns`."""
    numbers: dict[str, int] = {}
    found: dict[str, tuple[array, array, array]] = {}
    seen: set[str] = set()
    columns = (members[name].to_pylist() for name in MEMBERS.names)
    for text, kind, offset, size in zip(*columns, strict=True):
        name = from_text(text).removeprefix("./")
        parts = name.split("/")
        split = NAME.fullmatch(name)
        if kind:
            passed_over[f"{kind} in a tar"] += 1
        elif any(part.startswith(".") and part != ".." for part in parts) or "__MACOSX" in parts:
            passed_over["hidden file in a tar"] += 1
        elif split is None:
            passed_over["file without an extension in a tar"] += 1
        else:
            key, extension = split[1], split[2].lower()
            if (full := f"{key}.{extension}") in seen:
                raise UserError(
                    f"--data {source}: {short_name(file)} has two files {printable(full)}; write it again, with one "
                    "file of each extension for a key"
                )
            seen.add(full)
            at = found.setdefault(extension, (array("q"), array("q"), array("q")))
            for values, value in zip(at, (numbers.setdefault(key, len(numbers)), offset, size), strict=True):
                values.append(value)
    return [*numbers], {extension: np.array(at, np.int64) for extension, at in found.items()}


def _members(file: str, source: str) -> pa.Table:
    """The members of a tar, see `MEMBERS`; `kind` is "" for a file, else what it is. Kept in the cache if it is large.

    Raises:
        UserError: it can't be read, or is cut off.
    """
    try:
        status = Path(file).stat()
        identity = f"{VERSION}\0{Path(file).resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
        digest = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:32]
        kept = Path(cached_assets_path("infobatch-pretrain", "data", "tars")) / f"{digest}.parquet"
    except OSError as error:
        raise unreadable(file, source, str(error)) from None
    try:
        table = parquet.read_table(kept)
        if table.schema.equals(MEMBERS):
            return table
    except (OSError, ValueError, pa.ArrowException):
        pass
    start = time.monotonic()
    try:
        table = _read_members(file)
    except (OSError, ValueError, tarfile.TarError) as error:
        raise unreadable(file, source, str(error)) from None
    if time.monotonic() - start > SLOW:
        try:
            with atomic_write(kept) as part:
                parquet.write_table(table, part)
        except OSError:  # it is made again next time
            pass
    return table


def _read_members(file: str) -> pa.Table:
    """The members of a tar, from its headers.

    Raises:
        ValueError: it is compressed, cut off, or has something behind its end.
        tarfile.TarError: it is damaged.
        OSError: it can't be read.
    """
    names, kinds, offsets, sizes = [], [], array("q"), array("q")
    with Path(file).open("rb") as stream:
        head = stream.read(8)
        for first, command in PACKED.items():
            if head.startswith(first):
                raise ValueError(f"it is compressed, and images are read at their place in it; unpack it ({command})")
        stream.seek(0)
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                cast(Any, tar).members = []  # which it would collect
                if member.isdir():
                    continue
                names.append(to_text(member.name))
                link = member.issym() or member.islnk()
                special = "link" if link else "sparse file" if member.issparse() else "special file"
                kinds.append("" if member.isreg() and not member.issparse() else special)
                offsets.append(member.offset_data)
                sizes.append(member.size)
            end = tar.offset
        stream.seek(end)
        if (block := stream.read(len(BLOCK))) != BLOCK:
            raise ValueError(f"it is {'damaged' if len(block) == len(BLOCK) else 'cut off'} at byte {end:,}")
        while rest := stream.read(1 << 20):
            if rest.strip(b"\0"):
                raise ValueError("there is more behind its end, as if tar files were joined (tar -A joins them)")
    return pa.table([names, kinds, np.asarray(offsets), np.asarray(sizes)], schema=MEMBERS)


def image_of(samples: Samples, asked: str | None, source: str, note: Callable[[str], None]) -> tuple[np.ndarray, str]:
    """The image of each sample that has one.

    Args:
        samples: of a split.
        asked: --data.image, an extension, or None.
        source: the value of --data, for messages.
        note: called with a message on samples without an image.

    Returns:
        int64 [3, n], in the order of the samples, see `Samples.columns`; and the extensions, for the report.

    Raises:
        UserError: there is none, or several in a sample.
    """
    there = [name for name in samples.columns if f".{name.rpartition('.')[2]}" in SUFFIXES]
    known = listed([f".{name}" for name in samples.columns])
    if asked is not None and asked.lower().removeprefix(".") not in samples.columns:
        raise UserError(f"--data.image {asked}: the samples of {source} have no such files; they have {known}")
    chosen = there if asked is None else [asked.lower().removeprefix(".")]
    if not chosen:
        raise UserError(f"--data {source}: no sample has an image; their files are {known or 'none'}")
    found = np.concatenate([samples.columns[name] for name in chosen], axis=1)
    found = found[:, found[0].argsort(kind="stable")]
    twice = found[0, 1:][found[0, 1:] == found[0, :-1]]
    if len(twice):
        raise UserError(
            f"--data {source}: {len(twice):,} samples have several images ({samples.name_of(int(twice[0]))}, of "
            f"{listed([f'.{name}' for name in there])}); name their extension with --data.image"
        )
    if without := len(samples) - found.shape[1]:
        absent = np.setdiff1d(np.arange(len(samples)), found[0], assume_unique=True)
        note(f"{without:,} samples have no image and are not used, the first: {samples.name_of(int(absent[0]))}")
    return found, ", ".join(f".{name}" for name in chosen)


def labels_of(
    samples: Samples, asked: str | None, source: str, note: Callable[[str], None]
) -> tuple[list[Any], str, str]:
    """The label of each sample, None where it has none.

    Args:
        samples: of a split.
        asked: --data.label: an extension, or a field of the .json files; None: .cls, else a field called label or the
            like.
        source: the value of --data, for messages.
        note: called with messages on what is not used.

    Returns:
        The labels, where they are from, and the extension that was read.

    Raises:
        UserError: what is asked for is not there, or can't be read.
    """
    column = "cls" if asked is None else asked.lower().removeprefix(".")
    if column in samples.columns and column != "json":
        return _of_text(samples, column, source), f".{column} files", column
    if "json" not in samples.columns:
        if asked is not None:
            known = listed([f".{name}" for name in samples.columns])
            raise UserError(
                f"--data.label {asked}: the samples of {source} have no .json and no such files, but {known}"
            )
        return [None] * len(samples), "", ""
    wanted = LABELS if asked is None else (asked,)
    values: dict[str, list[Any]] = {}
    fields: Counter[str] = Counter()

    def take(sample: int, content: bytes) -> None:
        row = json.loads(content)
        if not isinstance(row, dict):
            raise ValueError("it is no object")
        fields.update(row.keys())
        for name in wanted:
            if name in row:
                values.setdefault(name, [None] * len(samples))[sample] = row[name]

    _read_column(samples, "json", source, take)
    found = [name for name in wanted if name in values]
    if not found:
        if asked is not None:
            raise UserError(
                f"--data.label {asked}: the .json files of {source} have no such field, but {listed([*fields])}"
            )
        note(f"fields of .json that are not used: {listed([*fields])}")
        return [None] * len(samples), "", "json"
    if others := [name for name in fields if name != found[0]]:
        note(f"fields of .json that are not used: {listed(others)}")
    labels = plain(values[found[0]], f"{found[0]} of .json", note)
    return without_missing(labels), f"field {found[0]} of .json files", "json"


def _of_text(samples: Samples, column: str, source: str) -> list[Any]:
    """Labels that are whole numbers, or the names of classes, in text files."""
    values: list[Any] = [None] * len(samples)
    names: dict[str, str] = {}  # so that equal ones are stored once

    def take(sample: int, content: bytes) -> None:
        text = content.decode().strip()
        values[sample] = names.setdefault(text, text)

    _read_column(samples, column, source, take)
    try:
        numbers = {text: int(text) for text in names if text}
    except ValueError:
        return without_missing(values)
    return without_missing([numbers.get(text) for text in values])


def _read_column(samples: Samples, column: str, source: str, take: Callable[[int, bytes], None]) -> None:
    """Call `take` with each sample that has a file of an extension, and the file's content.

    Raises:
        UserError: a file can't be read, or `take` raises ValueError.
    """
    found = samples.columns[column]
    bounds = np.searchsorted(samples.shard[found[0]], np.arange(len(samples.files) + 1))
    for number, file in enumerate(samples.files):
        own = found[:, bounds[number] : bounds[number + 1]]
        with Path(file).open("rb") as stream:
            for sample, offset, size in own.T.tolist():
                try:
                    if size > MAX_LABEL:
                        raise ValueError(f"it has {size:,} bytes")
                    stream.seek(offset)
                    take(sample, stream.read(size))
                except (ValueError, RecursionError) as error:
                    said = " ".join(str(error).split())
                    raise UserError(
                        f"--data {source}: the label in {samples.name_of(sample, column)} can't be read: {said}; "
                        "repair it, or name another one with --data.label"
                    ) from None


def tar_table(samples: Samples, image: np.ndarray, label: np.ndarray) -> datasets.Dataset:
    """The table of images in tar files, see `Images` and `FEATURES`.

    Args:
        samples: of the split.
        image: as `image_of` returns it.
        label: int64 [n].
    """
    rows, offset, size = image
    fields = {
        "path": samples.keys.take(pa.array(rows)).combine_chunks(),
        "shard": pa.array(samples.shard[rows], pa.int32()),
        "offset": pa.array(offset),
        "size": pa.array(size),
    }
    struct = pa.StructArray.from_arrays([*fields.values()], [*fields])
    table = pa.table({"image": struct, "label": pa.array(label)})
    return datasets.Dataset(InMemoryTable(table), datasets.DatasetInfo(features=FEATURES))
