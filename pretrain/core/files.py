"""Reading and writing the files of a run: whole or absent, never through a link.

The folder of a run may come from elsewhere. A link in it must not lead what a run writes to another place, and a named
pipe or a device must not be waited for.
"""

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_held: dict[Path, tuple[int, int]] = {}  # device and inode of the folders that this process writes runs to


def sync(path: Path) -> None:
    """Wait until a file, or a folder's names, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hold(folder: Path) -> None:
    """From now on nothing is written to the folder if another one has taken its place."""
    found = folder.stat()
    _held[folder.absolute()] = (found.st_dev, found.st_ino)


def release(folder: Path) -> None:
    """End `hold`."""
    _held.pop(folder.absolute(), None)


def _is_link(path: Path) -> OSError:
    return OSError(errno.ELOOP, f"{path} is a link or no plain file or folder, and is not written to; remove it")


def require_own(path: Path) -> None:
    """Check the folders between a folder of `hold` and a path in it.

    Raises:
        OSError: the folder that is held was replaced, or one of these folders is a link.
    """
    parents = path.absolute().parents
    for root, identity in [*_held.items()]:
        if root not in parents:
            continue
        found = root.stat()
        if (found.st_dev, found.st_ino) != identity:
            raise OSError(errno.ESTALE, f"{root} is another folder than when the run began")
        for folder in parents:
            if folder == root:
                break
            with suppress(FileNotFoundError):
                if not stat.S_ISDIR(os.lstat(folder).st_mode):
                    raise _is_link(folder)


def own_folder(path: Path) -> Path:
    """The folder, made if it isn't there.

    Raises:
        OSError: it is a link, or can't be made.
    """
    require_own(path)
    with suppress(FileExistsError):
        path.mkdir()
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise _is_link(path)
    return path


def open_own(path: Path, flags: int) -> int:
    """A handle of a plain file with one name; with the permissions that the umask leaves where it is new.

    Raises:
        OSError: it is a link, a device or the like, or has other names (hard links), or can't be opened.
    """
    require_own(path)
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _is_link(path) if error.errno in (errno.ELOOP, errno.ENXIO) else error from None
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(handle)
        raise _is_link(path)
    return handle


def require_plain(path: Path, *, inner_links: bool = False) -> None:
    """Check that a path, and everything in it if it is a folder, is a plain file or folder, or not there.

    Args:
        path: of the file or folder.
        inner_links: whether there may be links that lead to something in the same folder.

    Raises:
        OSError: something else is there.
    """
    within = os.path.realpath(path)
    pending = [path]
    while pending:
        each = pending.pop()
        try:
            mode = os.lstat(each).st_mode
        except FileNotFoundError:
            continue
        if stat.S_ISDIR(mode):
            pending += each.iterdir()
        elif not stat.S_ISREG(mode):
            inside = stat.S_ISLNK(mode) and os.path.realpath(each).startswith(within + os.sep)
            if each == path or not (inner_links and inside):
                raise _is_link(each)


def usual_mode(path: Path, mode: int | None = None) -> None:
    """Give a file, or all files in a folder, the permissions `mode`; some libraries write theirs with others.

    Args:
        path: of the file or the folder.
        mode: the permissions; None: those that a new file in the folder gets.
    """
    if mode is None:
        with replacing(path / "mode") as part:
            mode = stat.S_IMODE(part.stat().st_mode)
        (path / "mode").unlink()
    for file in [path] if path.is_file() else path.rglob("*"):
        with suppress(OSError):  # a file system without permissions
            if file.is_file() and not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) != mode:
                file.chmod(mode)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name beside a file's own to write to; when that is done it takes the file's place, on disk.

    At any moment the file is the old one or the new one. If writing fails nothing is left of it. Links are replaced,
    not followed.

    Raises:
        OSError: it can't be written.
    """
    require_own(file)
    part = file.with_name(f"{file.name}.part")
    part.unlink(missing_ok=True)
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    mode = stat.S_IMODE(os.fstat(handle).st_mode)  # what the umask leaves
    os.close(handle)
    try:
        yield part
        usual_mode(part, mode)
        sync(part)
        require_own(file)
        part.replace(file)
        sync(file.parent)
    finally:
        part.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: it can't be read, or is no plain file.
        ValueError: it isn't JSON, or nested too deeply.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, f"{path} is no plain file")
    try:
        return json.loads(path.read_text())
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
