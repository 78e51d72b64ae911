"""Tar files of WebDataset's kind for tests of data sets."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image


def png(value: int = 7, size: int = 4, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("L", (size, size), value).save(stream, kind)
    return stream.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of (name, content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files:
            add(tar, name, content)
    return path


def shards_of(folder: Path, output: Path, per_shard: int = 16) -> Path:
    """A folder of class folders as numbered shards, whose .cls has the class's number."""
    files = sorted(folder.glob("*/*.png"), key=lambda path: path.name)
    classes = sorted({path.parent.name for path in files})
    for number, start in enumerate(range(0, len(files), per_shard)):
        samples = (
            item
            for path in files[start : start + per_shard]
            for item in (
                (f"{path.stem}.png", path.read_bytes()),
                (f"{path.stem}.cls", b"%d" % classes.index(path.parent.name)),
            )
        )
        write_tar(output / f"images-{number:06d}.tar", samples)
    return output
