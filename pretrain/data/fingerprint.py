"""Fingerprints of a data set, 4 bytes per sample, to refuse resuming a run on other images than its scores are of."""

import copy
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pretrain.core.files import expand
from pretrain.data.files import from_text, read_packed
from pretrain.data.images import Images

if TYPE_CHECKING:  # it imports `digest`
    from pretrain.data.sources import Source

MAX_HASHED_BYTES = 256 * 1024**2  # of a data set whose content is hashed; of larger ones only names and sizes are
MAX_STAT_FILES = 100_000  # of a data set whose file sizes are read; a million of them would take minutes
CHUNK = 1000  # rows processed at a time


def fingerprints(source: "Source") -> dict[str, Tensor]:
    """The `fingerprint` of the training images ("train") and of the held-out ones ("test")."""
    return {"train": fingerprint(source.train), "test": fingerprint(source.test)}


def digest(images: Images, index: np.ndarray | slice = slice(None)) -> str:
    """A hash of the `fingerprint` of some of the images, int64 [n], as if there were no others."""
    some = copy.copy(images)
    some.rows = images.rows[index]
    return hashlib.sha256(fingerprint(some).numpy().tobytes()).hexdigest()[:16]


def fingerprint(images: Images) -> Tensor:
    """A hash of each sample's name, label and size, and of its encoded bytes if they are few enough.

    Returns:
        int32 [N]; 4-byte BLAKE2b hashes. The bytes are hashed in data sets of up to `MAX_HASHED_BYTES`; sizes
        are left out if there are more than `MAX_STAT_FILES` files.
    """
    rows, total = [], 0
    for name, label, content, size in _rows(images):
        total += size
        rows.append((name, label, content if total <= MAX_HASHED_BYTES else b"", size))  # they must fit into memory
    hash_content = total <= MAX_HASHED_BYTES
    hashes = []
    for name, label, content, size in rows:
        digest = hashlib.blake2b(f"{name}\0{label}\0{size}\0".encode(errors="surrogateescape"), digest_size=4)
        if hash_content:
            digest.update(content if isinstance(content, bytes) else _read(name, content, images))
        hashes.append(int.from_bytes(digest.digest(), "little", signed=True))
    return torch.tensor(hashes, dtype=torch.int32)


def _rows(images: Images) -> Iterator[tuple[str, int, bytes | dict[str, Any] | None, int]]:
    """Yield each sample's name, label, encoded bytes and their number.

    In place of bytes that lie in a tar file is the row's image, of bytes in a file of their own None.
    """
    root = expand(images.data.source)
    for start in range(0, len(images.rows), CHUNK):
        rows = images.table[images.rows[start : start + CHUNK].tolist()]
        if "image" in rows:
            encoded = [_content(image) for image in rows["image"]]
        else:
            encoded = [*zip(rows["latent"], rows["path"], strict=True)]
        for (content, path), label in zip(encoded, rows["label"], strict=True):
            if isinstance(content, dict):
                yield path or "", int(label), content, content["size"]
            elif content is None and path:
                size = _size(images.file_of(path)) if len(images) <= MAX_STAT_FILES else MAX_HASHED_BYTES
                name = os.path.relpath(from_text(path), root) if images.reading.folders is None else path
                yield name, int(label), None, size
            else:
                yield path or "", int(label), content or b"", len(content or b"")


def _content(image: Any) -> tuple[bytes | dict[str, Any] | None, str | None]:
    """The bytes and the path of a row's image; if it lies in a tar file, the image itself in place of the bytes."""
    if image is None:
        return b"", None
    if isinstance(image, dict) and "shard" in image:
        return image, image["path"]
    return (image["bytes"], image["path"]) if isinstance(image, dict) else (np.asarray(image).tobytes(), None)


def _size(file: str | None) -> int:
    try:
        return os.stat(file).st_size if file is not None else -1  # noqa: PTH116 (Path fails for names of any bytes)
    except OSError:  # it was removed since; reading the image reports it
        return -1


def _read(name: str, place: dict[str, Any] | None, images: Images) -> bytes:
    """The bytes of an image in a file, or at a place in a tar file; b"" if they can't be read."""
    if place is not None:
        try:
            return read_packed(place, images.reading.shards)
        except (OSError, ValueError):
            return b""
    source = expand(images.data.source)
    file = os.path.join(source, name) if images.reading.folders is None else images.file_of(name)  # noqa: PTH118
    try:
        return Path(file).read_bytes() if file and Path(file).is_file() else b""
    except OSError:
        return b""


def describe_changes(before: dict[str, Tensor], now: dict[str, Tensor], source: "Source") -> str:
    """Describe how a data set has changed since a checkpoint, for a message.

    Args:
        before: the fingerprints in the checkpoint.
        now: those of `source`.
        source: the data set, for the names of its images.

    Returns:
        "" if it has not changed.
    """
    train = _describe_changes(before["train"], now["train"], source.train)
    test = _describe_changes(before["test"], now["test"], source.test)
    return train or (f"of the held-out images, {test}" if test else "")


def _describe_changes(before: Tensor, now: Tensor, images: Images) -> str:
    if torch.equal(before, now):
        return ""
    old, new = {*before.tolist()}, {*now.tolist()}
    added = [number for number, value in enumerate(now.tolist()) if value not in old]
    removed = [number for number, value in enumerate(before.tolist()) if value not in new]
    changes = [f"{len(before)} images then, {len(now)} now"] if len(before) != len(now) else []
    if added:
        changes.append(f"{len(added)} are new or changed, the first: {images.name_of(added[0])}")
    if removed:
        changes.append(f"{len(removed)} are gone or changed, the first: number {removed[0]}")
    return ", ".join(changes) or "their order has changed"
