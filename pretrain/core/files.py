"""Reading and writing the files of a run.

Writes are atomic: a crash leaves the old content or the new one, never a part. The folder of a run may come from
elsewhere, so no link in it is followed by a write, and no named pipe or device is opened, which would wait.
"""

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pretrain.core.errors import UserError

_held: dict[Path, tuple[int, int]] = {}  # device and inode of the folders of runs that this process writes


def expand(path: str | Path) -> Path:
    """The path with `~` and `~user` as their home folders; as it is if there is no such user or home."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises a RuntimeError then


def flush(handle: int) -> None:
    """Wait until what was written to a file descriptor is on disk, where the file system can say so.

    Raises:
        OSError: it could not be written.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # of folders on some network file systems
            raise


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        flush(handle)
    finally:
        os.close(handle)


def hold(folder: Path) -> None:
    """Remember which folder this path is, so that `require_own` notices if another one takes its place."""
    found = folder.stat()
    _held[folder.absolute()] = (found.st_dev, found.st_ino)


def release(folder: Path) -> None:
    """End `hold`."""
    _held.pop(folder.absolute(), None)


def _is_link(path: Path) -> OSError:
    return OSError(errno.ELOOP, f"{path} is a link or not a regular file or folder, and is not written to; remove it")


def require_own(path: Path) -> None:
    """Check a path inside a folder given to `hold`.

    Raises:
        OSError: that folder was replaced, or a folder between it and the path is a link.
    """
    parents = path.absolute().parents
    for root, identity in [*_held.items()]:
        if root not in parents:
            continue
        found = root.stat()
        if (found.st_dev, found.st_ino) != identity:
            raise OSError(errno.ESTALE, f"{root} is not the folder that it was when the run began")
        for folder in parents:
            if folder == root:
                break
            with suppress(FileNotFoundError):
                if not stat.S_ISDIR(os.lstat(folder).st_mode):
                    raise _is_link(folder)


def own_folder(path: Path) -> Path:
    """Return the folder; it is created if it does not exist.

    Raises:
        OSError: it is a link, or can't be created.
    """
    require_own(path)
    with suppress(FileExistsError):
        path.mkdir()
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise _is_link(path)
    return path


def open_own(path: Path, flags: int) -> int:
    """Open a regular file without following a link; a new file has the permissions that the umask leaves.

    Returns:
        The file descriptor.

    Raises:
        OSError: it is a symbolic link, has other hard links, is a device or the like, or can't be opened.
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


def require_utf8(folder: Path) -> None:
    """Check that a folder to write to has a path that the libraries which write models can open again.

    Raises:
        UserError: its path is not UTF-8.
    """
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"--output-dir {folder}: its path is not UTF-8, and safetensors files in it can't be opened; name another "
            "folder"
        ) from None


def require_plain(path: Path, *, inner_links: bool = False) -> None:
    """Check that a path, and everything in it if it is a folder, is a regular file or folder, or does not exist.

    Args:
        path: of the file or folder.
        inner_links: whether links to something in the same folder are allowed.

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
    """Set the permissions of a file or of all files in a folder; some libraries choose their own.

    Args:
        path: of the file or the folder.
        mode: the permissions; None: those of a new file in the folder.
    """
    if mode is None:
        with atomic_write(path / "mode") as part:
            mode = stat.S_IMODE(part.stat().st_mode)
        (path / "mode").unlink()
    for file in [path] if path.is_file() else path.rglob("*"):
        with suppress(OSError):  # a file system without permissions
            if file.is_file() and not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) != mode:
                file.chmod(mode)


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; when the block ends, rename it to `file` and flush both to disk.

    At any moment `file` has its old content or its new one. If the block raises, the temporary file is removed. A link
    is replaced, not followed.

    Raises:
        OSError: it can't be written.
    """
    require_own(file)
    temporary = file.with_name(f"{file.name}.part")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    mode = stat.S_IMODE(os.fstat(handle).st_mode)  # what the umask leaves
    os.close(handle)
    try:
        yield temporary
        usual_mode(temporary, mode)
        fsync(temporary)
        require_own(file)
        temporary.replace(file)
        fsync(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: it can't be read, or is not a regular file.
        ValueError: it isn't JSON, or nested too deeply.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, f"{path} is not a regular file")
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
