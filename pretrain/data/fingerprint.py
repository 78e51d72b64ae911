"""What a data set is, in four bytes a sample, so that a run goes on with the images that its scores belong to."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

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
    seen = [*_rows(images)]
    whole = sum(size for *_, size in seen) <= WHOLE
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
        given = rows.get("image") or [
            {"bytes": content, "path": path} for content, path in zip(rows["latent"], rows["path"], strict=True)
        ]
        for image, label in zip(given, rows["label"], strict=True):
            content, path = image["bytes"], image["path"]
            if content is not None:
                yield path or "", label, content, len(content)
            else:
                yield os.path.relpath(path, root), label, None, _size(path) if len(images) <= MANY else WHOLE


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:  # it has vanished; whoever visits it says so
        return -1


def _read(name: str, images: Images) -> bytes:
    try:
        return (Path(images.data.source).expanduser() / name).read_bytes()
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
