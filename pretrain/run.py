"""A run's folder: who may write into it."""

import shutil
from pathlib import Path

import yaml

from pretrain import checkpoint
from pretrain.config import Config
from pretrain.errors import Refused

OURS = {"config.yaml", "journal.jsonl", "summary.json", "checkpoints", "pictures", "model", "trackers"}


def resume_from(config: Config) -> Path | None:
    """The checkpoint that a run goes on from, if it is asked to.

    Raises:
        Refused: there is none, or the folder holds something that must not be lost.
    """
    folder = config.output_dir
    if config.resume:
        path = checkpoint.newest(folder / "checkpoints") if config.resume == "newest" else Path(config.resume)
        if path is None:
            raise Refused(f"--resume: {folder} holds no checkpoint; start the run without --resume")
        return path
    if folder.exists() and not folder.is_dir():
        raise Refused(f"--output-dir {folder}: a file of that name is there; name a folder")
    names = {item.name for item in folder.iterdir()} if folder.is_dir() else set()
    if names - OURS:
        raise Refused(
            f"--output-dir {folder}: the folder holds {sorted(names - OURS)[0]!r}, which no run wrote; "
            "name a new or an empty folder"
        )
    if names and not config.overwrite:
        raise Refused(
            f"--output-dir {folder}: the folder holds a run; go on with it (--resume), replace it (--overwrite), "
            "or name another folder"
        )
    return None


def prepare(config: Config, resumed: bool) -> None:
    """Make the folder ready: without the old run's files unless it goes on, and with the config."""
    folder = config.output_dir
    if not resumed and folder.is_dir():
        for name in OURS:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    try:
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
        (folder / "config.yaml").write_text(text)
    except OSError as error:
        raise Refused(f"--output-dir {folder}: can't be written to: {error}") from None
