"""What a data set is, in four bytes a sample, so that a run goes on with the images that its scores belong to."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.data.files import from_text
from pretrain.data.images import Images
from pretrain.data.sources import Source

WHOLE = 256 * 1024**2  # bytes of images that are read whole; of larger data sets names and sizes are compared
MANY = 100_000  # files; of more than that names and labels alone, because asking for a million sizes takes minutes
CHUNK = 1000  # rows at once


def fingerprints(source: Source) -> dict[str, Tensor]:
    """That of the images to train on, and of those held out."""
    return {"train": fingerprint(source.train), "test": fingerprint(source.test)}


def fingerprint(images: Images) -> Tensor:
    """int32 [N]: of each sample its name, label, size and, in a data set of up to 256 MB, its bytes."""
    seen, total = [], 0
    for name, label, content, size in _rows(images):
        total += size
        seen.append((name, label, content if total <= WHOLE else None, size))  # larger ones do not fit into memory
    whole = total <= WHOLE
    found = []
    for name, label, content, size in seen:
        digest = hashlib.blake2b(f"{name}\0{label}\0{size}\0".encode(errors="surrogateescape"), digest_size=4)
        if whole:
            digest.update(content if content is not None else _read(name, images))
        found.append(int.from_bytes(digest.digest(), "little", signed=True))
    return torch.tensor(found, dtype=torch.int32)


def _rows(images: Images) -> Iterator[tuple[str, int, bytes | None, int]]:
    """Name, label, bytes if they are in the table, and their number."""
    root = Path(images.data.source).expanduser()
    for start in range(0, len(images.rows), CHUNK):
        rows = images.table[images.rows[start : start + CHUNK].tolist()]
        if "image" in rows:
            found = [_content(image) for image in rows["image"]]
        else:
            found = [*zip(rows["latent"], rows["path"], strict=True)]
        for (content, path), label in zip(found, rows["label"], strict=True):
            if content is None and path:
                file = images.file_of(path)
                name = os.path.relpath(from_text(path), root) if images.reading.folders is None else path
                yield name, int(label), None, _size(file) if len(images) <= MANY else WHOLE
            else:
                yield path or "", int(label), content or b"", len(content or b"")


def _content(image: Any) -> tuple[bytes | None, str | None]:
    """The bytes and the path of a row's image."""
    if image is None:
        return b"", None
    return (image["bytes"], image["path"]) if isinstance(image, dict) else (np.asarray(image).tobytes(), None)


def _size(file: str | None) -> int:
    try:
        return os.stat(file).st_size if file is not None else -1  # noqa: PTH116 — not Path: it may hold any bytes
    except OSError:  # it has vanished, which is reported when it is used
        return -1


def _read(name: str, images: Images) -> bytes:
    file = os.path.join(images.data.source, name)  # noqa: PTH118
    file = os.path.expanduser(file) if images.reading.folders is None else images.file_of(name)  # noqa: PTH111
    try:
        return Path(file).read_bytes() if file and os.path.isfile(file) else b""  # noqa: PTH113
    except OSError:
        return b""


def changed(before: dict[str, Tensor], now: dict[str, Tensor], source: Source) -> str:
    """What is no longer as it was, in words; empty if nothing.

    Args:
        before: the fingerprints in a checkpoint.
        now: those of `source`.
        source: the data set.
    """
    train = _changed(before["train"], now["train"], source.train)
    test = _changed(before["test"], now["test"], source.test)
    return train or (f"of those held out, {test}" if test else "")


def _changed(before: Tensor, now: Tensor, images: Images) -> str:
    if torch.equal(before, now):
        return ""
    old, new = {*before.tolist()}, {*now.tolist()}
    added = [number for number, mark in enumerate(now.tolist()) if mark not in old]
    gone = [number for number, mark in enumerate(before.tolist()) if mark not in new]
    said = [f"{len(before)} images then, {len(now)} now"] if len(before) != len(now) else []
    if added:
        said.append(f"{len(added)} are new or changed, the first: {images.name_of(added[0])}")
    if gone:
        said.append(f"{len(gone)} of then are gone or changed, the first: number {gone[0]}")
    return ", ".join(said) or "they come in another order"
