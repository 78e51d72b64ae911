"""A run's folder: who may write into it."""

import errno
import fcntl
import os
import platform
import shutil
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import yaml

from pretrain import __version__
from pretrain.checkpoint import storage
from pretrain.config.schema import Config
from pretrain.core.errors import UserError
from pretrain.core.files import atomic_write

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


def resume_from(config: Config) -> storage.Found | None:
    """The checkpoint that a run goes on from, if it is asked to.

    Raises:
        UserError: there is none that is whole, or the folder holds something that must not be lost.
    """
    folder = config.output_dir
    data = Path(config.data.source).expanduser()
    if data.exists() and folder.resolve() in (data.resolve(), *data.resolve().parents):
        raise UserError(f"--output-dir {folder}: --data {data} lies in it; name another folder")
    if config.resume:
        return _checkpoint(folder, config.resume)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output-dir {folder}: a file of that name is there; name a folder")
    names = {item.name for item in folder.iterdir()} - {LOCK, "config.yaml.part"} if folder.is_dir() else set()
    foreign = sorted(names - FILES) if _is_run(folder) else sorted(names)
    if foreign:
        raise UserError(
            f"--output-dir {folder}: the folder holds {foreign[0]!r}, which no run wrote; name a new or an empty folder"
        )
    if names and not config.overwrite:
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
            self.handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"--output-dir {folder}: can't be written to: {error.strerror}") from None
        try:
            fcntl.lockf(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.read(self.handle, 200).decode(errors="replace").strip() or "another process"
                raise UserError(
                    f"--output-dir {folder}: {holder} is writing to it; wait for its end, or name another folder"
                ) from None
            # A file system without locks: nobody can tell.
        with suppress(OSError):  # a full disk is met later, where it matters
            os.ftruncate(self.handle, 0)
            os.pwrite(self.handle, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)


def prepare(config: Config, resumed: storage.Found | None) -> Lock:
    """Lock the folder and make it ready: the config in it, the old run's files gone, damaged checkpoints put aside.

    Raises:
        UserError: it can't be written to, or another process holds it.
    """
    folder = config.output_dir
    lock = Lock(folder)
    if resumed is None:
        resume_from(config)  # once more: now nobody else writes to it
    try:
        if resumed is None:
            for name in FILES - {"config.yaml"}:  # which says that the rest is a run's, until the new one says so
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in resumed.skipped if resumed else ():
            if not path.suffix:  # so that it isn't counted among those that are kept
                shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)  # the same step's of an earlier time
                path.rename(path.with_suffix(".damaged"))
        with atomic_write(folder / "config.yaml") as file:  # first: it is what makes the folder a run's
            file.write_text(_made_with() + yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
        (folder / "pictures").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: can't be written to: {error}") from None
    return lock


def _made_with() -> str:
    """A comment that says by which versions the run was made, or went on: numbers differ between them."""
    packages = ("torch", "torchvision", "timm", "diffusers")
    others = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"# infobatch-pretrain {__version__}, {others}; Python {platform.python_version()}\n"
