"""A run's folder: who may write into it."""

import shutil
from pathlib import Path

import yaml

from pretrain import checkpoint
from pretrain.config import Config
from pretrain.errors import Refused

OURS = {
    "config.yaml",
    "journal.jsonl",
    "summary.json",
    "evaluation.json",
    "checkpoints",
    "averages",
    "pictures",
    "model",
    "trackers",
}


def resume_from(config: Config) -> Path | None:
    """The checkpoint that a run goes on from, if it is asked to.

    Raises:
        Refused: there is none, or the folder holds something that must not be lost.
    """
    folder = config.output_dir
    data = Path(config.data.source).expanduser()
    if data.exists() and folder.resolve() in (data.resolve(), *data.resolve().parents):
        raise Refused(f"--output-dir {folder}: --data {data} lies in it; name another folder")
    if config.resume:
        return _checkpoint(folder, config.resume)
    if folder.exists() and not folder.is_dir():
        raise Refused(f"--output-dir {folder}: a file of that name is there; name a folder")
    names = {item.name for item in folder.iterdir()} if folder.is_dir() else set()
    foreign = sorted(names - OURS) if _is_run(folder) else sorted(names)
    if foreign:
        raise Refused(
            f"--output-dir {folder}: the folder holds {foreign[0]!r}, which no run wrote; name a new or an empty folder"
        )
    if names and not config.overwrite:
        raise Refused(
            f"--output-dir {folder}: the folder holds a run; go on with it (--resume), replace it (--overwrite), "
            "or name another folder"
        )
    return None


def _checkpoint(folder: Path, resume: str) -> Path:
    """The run's checkpoint that is meant; another run's would write over this one's files."""
    if resume == "newest":
        newest = checkpoint.newest(folder / "checkpoints")
        if newest is None:
            raise Refused(f"--resume: {folder} holds no checkpoint; start it without --resume, or with --overwrite")
        return newest
    path = Path(resume).expanduser()
    if not path.is_dir() or path.resolve().parent.name != "checkpoints":
        raise Refused(f"--resume {resume}: there is no checkpoint there; a run keeps them in its checkpoints/")
    if path.resolve().parent.parent != folder.resolve():
        raise Refused(f"--resume {resume}: that checkpoint is not of the run in --output-dir {folder}")
    return path


def _is_run(folder: Path) -> bool:
    """Whether the folder's config.yaml is one that `prepare` wrote, not some other program's."""
    try:
        written = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(written, dict) and {"adapter", "model", "output_dir", "pruning"} <= written.keys()


def prepare(config: Config, resumed: bool) -> None:
    """Make the folder ready: without the old run's files unless it goes on, and with the config."""
    folder = config.output_dir
    if not resumed and folder.is_dir():
        for name in OURS:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
        (folder / "config.yaml").write_text(text)  # first: it is what makes the folder a run's
        (folder / "pictures").mkdir(exist_ok=True)
    except OSError as error:
        raise Refused(f"--output-dir {folder}: can't be written to: {error}") from None
