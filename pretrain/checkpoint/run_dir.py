"""The folder of a run: checking, locking and preparing it before anything is written."""

import errno
import fcntl
import os
import platform
import shutil
import sys
import weakref
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import yaml

from pretrain import __version__
from pretrain.checkpoint import storage
from pretrain.config.cli import read_plain_yaml
from pretrain.config.schema import LAUNCH_ONLY, Config
from pretrain.core.errors import UserError
from pretrain.core.files import atomic_write, expand, hold, open_own, own_folder, release, require_plain, require_utf8

LOCK = ".lock"
FILES = {
    "config.yaml",
    "data.json",
    "metrics.jsonl",
    "summary.json",
    "evaluation.json",
    "bad-step.safetensors",
    "checkpoints",
    "ema",
    "pictures",
    "generated",
    "model",
    "trackers",
}


def resume_from(config: Config) -> storage.FoundCheckpoint | None:
    """The checkpoint that a run continues from; None for a new run.

    Raises:
        UserError: there is no undamaged checkpoint to resume from, or a new run would overwrite something in the folder
            that `--overwrite` does not cover.
    """
    folder = config.output_dir
    require_utf8(folder)
    data = expand(config.data.source)
    if data.exists() and folder.resolve() in (data.resolve(), *data.resolve().parents):
        raise UserError(f"--output-dir {folder}: --data {data} is inside it; name another folder")
    auto = config.resume == "auto"
    if config.resume and (not auto or storage.newest(folder / "checkpoints") is not None):
        return _checkpoint(folder, "newest" if auto else config.resume)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output-dir {folder}: it is a file; name a folder")
    names = {item.name for item in folder.iterdir()} - {LOCK, "config.yaml.part"} if folder.is_dir() else set()
    foreign = sorted({name.removesuffix(".part") for name in names} - FILES) if _is_run(folder) else sorted(names)
    if foreign:
        raise UserError(
            f"--output-dir {folder}: the folder has {foreign[0]!r}, which no run wrote; name a new or an empty folder"
        )
    begun = auto and "summary.json" not in names  # and ended before its first checkpoint, so nothing is lost
    if names and not config.overwrite and not begun:
        raise UserError(
            f"--output-dir {folder}: the folder has a run; continue it (--resume), replace it (--overwrite), or name "
            "another folder"
        )
    return None


def _checkpoint(folder: Path, resume: str) -> storage.FoundCheckpoint:
    """The checkpoint that --resume names; it must be one of this folder, whose files the run will continue."""
    if resume == "newest":
        newest = storage.newest_whole(folder / "checkpoints")
        if newest is None:
            raise UserError(f"--resume: {folder} has no checkpoint; start without --resume, or with --overwrite")
        return newest
    path = expand(resume)
    if not path.is_dir() or path.resolve().parent.name != "checkpoints":
        raise UserError(f"--resume {resume}: there is no such checkpoint; those of a run are in its checkpoints/")
    if path.resolve().parent.parent != folder.resolve():
        raise UserError(f"--resume {resume}: this checkpoint is not of the run in --output-dir {folder}")
    try:
        return storage.FoundCheckpoint(path, storage.load(path), {})
    except UserError as error:
        raise UserError(f"{error}; --resume without a path uses the newest undamaged checkpoint") from None


def _is_run(folder: Path) -> bool:
    """Whether the folder's config.yaml was written by `prepare`, not by another program."""
    try:
        written = read_plain_yaml(folder / "config.yaml")
    except (OSError, ValueError):
        return False
    return isinstance(written, dict) and {"adapter", "model", "output_dir", "pruning"} <= written.keys()


class Lock:
    """An exclusive lock of a run's folder, which is created if necessary.

    It is released with the object and at the end of the process, even if that is killed. A POSIX lock (lockf), which
    network file systems support, too.

    Raises:
        UserError: another process has the lock, or the folder can't be written to.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.folder, self.handle = folder, open_own(folder / LOCK, os.O_RDWR | os.O_CREAT)
            self.directory = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"--output-dir {folder}: can't be written to: {error.strerror}") from None
        own = weakref.ref(self)  # a loader's worker that outlives this process must not keep the folder locked
        os.register_at_fork(after_in_child=lambda: (lock := own()) and lock._close_directory())
        this = f"process {os.getpid()} on {os.uname().nodename}"
        # The folder too, because the file may be removed. A file system without locks gives no protection.
        for take, handle in ((fcntl.lockf, self.handle), (fcntl.flock, self.directory)):
            try:
                take(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(self.handle, 200, 0).decode(errors="replace").strip() or "another process"
                if error.errno in (errno.EACCES, errno.EAGAIN) and holder != this:
                    raise UserError(
                        f"--output-dir {folder}: {holder} is writing to it; wait until it ends, or name another folder"
                    ) from None
        with suppress(OSError):  # only information for the message above
            os.ftruncate(self.handle, 0)
            os.pwrite(self.handle, f"{this}\n".encode(), 0)
        hold(folder)
        self.holds = True

    def _close_directory(self) -> None:
        directory, self.directory = getattr(self, "directory", None), None
        if directory is not None:
            os.close(directory)

    def __del__(self) -> None:
        if sys is None or sys.is_finalizing():  # modules are gone; the process's end releases the locks
            return
        self._close_directory()
        if hasattr(self, "handle"):
            os.close(self.handle)
        if hasattr(self, "holds"):  # not one that was refused
            release(self.folder)


def prepare(config: Config, resumed: storage.FoundCheckpoint | None) -> Lock:
    """Lock the folder, remove the files of a run that is replaced, rename damaged checkpoints and write the config.

    Args:
        config: of the run.
        resumed: the checkpoint that it continues from; None for a new run.

    Raises:
        UserError: the folder can't be written to, or another process has its lock.
    """
    folder = config.output_dir
    lock = Lock(folder)
    if resumed is None and resume_from(config) is not None:  # checked again, now under the lock
        raise UserError(f"--output-dir {folder}: another process has started a run there meanwhile; start again")
    try:
        for name in FILES:
            if name not in ("checkpoints", "generated"):  # what is in them is read or removed, never written to
                require_plain(folder / name, inner_links=name == "trackers")
            elif (folder / name).is_symlink():
                own_folder(folder / name)
            path = folder / name
            if resumed is not None and path.exists() and path.is_dir() == bool(path.suffix):
                raise OSError(f"{path} is not a {'file' if path.suffix else 'folder'}; move it away")
        if resumed is None:
            for name in FILES - {"config.yaml"}:  # kept until it is replaced: it marks the folder as a run's
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in resumed.skipped if resumed else ():
            if not path.suffix:  # renamed, so that it does not count as one of the checkpoints to keep
                shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)  # of an earlier resume
                path.rename(path.with_suffix(".damaged"))
        with atomic_write(folder / "config.yaml") as file:  # the first file: it marks the folder as a run's
            settings = {name: value for name, value in config.to_dict().items() if name not in LAUNCH_ONLY}
            file.write_text(_versions() + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), "utf-8")
        own_folder(folder / "pictures")
    except OSError as error:
        raise UserError(f"--output-dir {folder}: can't be written to: {error}") from None
    return lock


def _versions() -> str:
    """A YAML comment with the versions that the run uses; numbers may differ between versions."""
    packages = ("torch", "torchvision", "timm", "diffusers")
    others = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"# infobatch-pretrain {__version__}, {others}; Python {platform.python_version()}\n"
