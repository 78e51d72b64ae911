"""A run's folder: who may write into it."""

import errno
import fcntl
import os
import platform
import shutil
import weakref
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import yaml

from pretrain import __version__
from pretrain.checkpoint import storage
from pretrain.config.schema import LAUNCH_ONLY, Config
from pretrain.core.errors import UserError
from pretrain.core.files import hold, open_own, own_folder, release, replacing, require_plain

LOCK = ".lock"
FILES = {
    "config.yaml",
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


def resume_from(config: Config) -> storage.Found | None:
    """The checkpoint that a run goes on from, if it is asked to.

    Raises:
        UserError: there is none that is whole, or the folder holds something that must not be lost.
    """
    folder = config.output_dir
    data = Path(config.data.source).expanduser()
    if data.exists() and folder.resolve() in (data.resolve(), *data.resolve().parents):
        raise UserError(f"--output-dir {folder}: --data {data} lies in it; name another folder")
    auto = config.resume == "auto"
    if config.resume and (not auto or storage.newest(folder / "checkpoints") is not None):
        return _checkpoint(folder, "newest" if auto else config.resume)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output-dir {folder}: a file of that name is there; name a folder")
    names = {item.name for item in folder.iterdir()} - {LOCK, "config.yaml.part"} if folder.is_dir() else set()
    foreign = sorted({name.removesuffix(".part") for name in names} - FILES) if _is_run(folder) else sorted(names)
    if foreign:
        raise UserError(
            f"--output-dir {folder}: the folder holds {foreign[0]!r}, which no run wrote; name a new or an empty folder"
        )
    begun = auto and "summary.json" not in names  # and ended before its first checkpoint, so nothing is lost
    if names and not config.overwrite and not begun:
        raise UserError(
            f"--output-dir {folder}: the folder holds a run; go on with it (--resume), replace it (--overwrite), "
            "or name another folder"
        )
    return None


def _checkpoint(folder: Path, resume: str) -> storage.Found:
    """The run's checkpoint that is meant; another run's would write over this one's files."""
    if resume == "newest":
        newest = storage.newest_whole(folder / "checkpoints")
        if newest is None:
            raise UserError(f"--resume: {folder} holds no checkpoint; start it without --resume, or with --overwrite")
        return newest
    path = Path(resume).expanduser()
    if not path.is_dir() or path.resolve().parent.name != "checkpoints":
        raise UserError(f"--resume {resume}: there is no checkpoint there; a run keeps them in its checkpoints/")
    if path.resolve().parent.parent != folder.resolve():
        raise UserError(f"--resume {resume}: that checkpoint is not of the run in --output-dir {folder}")
    try:
        return storage.Found(path, storage.load(path), {})
    except UserError as refusal:
        raise UserError(f"{refusal}; --resume alone takes the newest one that is whole") from None


def _is_run(folder: Path) -> bool:
    """Whether the folder's config.yaml is one that `prepare` wrote, not some other program's."""
    try:
        written = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    return isinstance(written, dict) and {"adapter", "model", "output_dir", "pruning"} <= written.keys()


class Lock:
    """Holds a run's folder, made if it isn't there, so that no other program writes to it.

    It ends with the object and with the process, however that ends. It is one of POSIX (lockf), which network file
    systems know too.

    Raises:
        UserError: another process holds it, or the folder can't be written to.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.folder, self.handle = folder, open_own(folder / LOCK, os.O_RDWR | os.O_CREAT)
            self.directory = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"--output-dir {folder}: can't be written to: {error.strerror}") from None
        own = weakref.ref(self)  # a worker that outlives this process must not keep the folder locked
        os.register_at_fork(after_in_child=lambda: (lock := own()) and lock._close_directory())
        this = f"process {os.getpid()} on {os.uname().nodename}"
        # The folder itself, too: the file may be removed. Neither is locked on file systems that can't.
        for take, handle in ((fcntl.lockf, self.handle), (fcntl.flock, self.directory)):
            try:
                take(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(self.handle, 200, 0).decode(errors="replace").strip() or "another process"
                if error.errno in (errno.EACCES, errno.EAGAIN) and holder != this:
                    raise UserError(
                        f"--output-dir {folder}: {holder} is writing to it; wait for its end, or name another folder"
                    ) from None
        with suppress(OSError):  # a full disk is met later, where it matters
            os.ftruncate(self.handle, 0)
            os.pwrite(self.handle, f"{this}\n".encode(), 0)
        hold(folder)
        self.holds = True

    def _close_directory(self) -> None:
        directory, self.directory = getattr(self, "directory", None), None
        if directory is not None:
            os.close(directory)

    def __del__(self) -> None:
        self._close_directory()
        if hasattr(self, "handle"):
            os.close(self.handle)
        if hasattr(self, "holds"):  # not one that was refused
            release(self.folder)


def prepare(config: Config, resumed: storage.Found | None) -> Lock:
    """Lock the folder and make it ready: the config in it, the old run's files gone, damaged checkpoints put aside.

    Raises:
        UserError: it can't be written to, or another process holds it.
    """
    folder = config.output_dir
    lock = Lock(folder)
    if resumed is None and resume_from(config) is not None:  # once more: now no other process writes to it
        raise UserError(f"--output-dir {folder}: another process has begun a run there meanwhile; start again")
    try:
        for name in FILES:
            if name not in ("checkpoints", "generated"):  # what is in them is read or removed, never written to
                require_plain(folder / name, inner_links=name == "trackers")
            elif (folder / name).is_symlink():
                own_folder(folder / name)
        if resumed is None:
            for name in FILES - {"config.yaml"}:  # which says that the rest is a run's, until the new one says so
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in resumed.skipped if resumed else ():
            if not path.suffix:  # so that it isn't counted among those that are kept
                shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)  # the same step's of an earlier time
                path.rename(path.with_suffix(".damaged"))
        with replacing(folder / "config.yaml") as file:  # first: it is what makes the folder a run's
            settings = {name: value for name, value in config.to_dict().items() if name not in LAUNCH_ONLY}
            file.write_text(_made_with() + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        own_folder(folder / "pictures")
    except OSError as error:
        raise UserError(f"--output-dir {folder}: can't be written to: {error}") from None
    return lock


def _made_with() -> str:
    """A comment that says by which versions the run was made, or went on: numbers differ between them."""
    packages = ("torch", "torchvision", "timm", "diffusers")
    others = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"# infobatch-pretrain {__version__}, {others}; Python {platform.python_version()}\n"
