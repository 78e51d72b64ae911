"""Code of the user's own runs where the user has named it, not because a file of settings does.

A recipe, or the folder of a run, may come from anywhere. What it calls its adapter, model or policy is run if it is
part of this project, or a file that this user has once named on a command line.
"""

import os
from contextlib import suppress
from pathlib import Path

from pretrain.core.errors import UserError

VARIABLE = "PRETRAIN_TRUST"  # more such files, for one command


def _list() -> Path:
    folder = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(folder).expanduser() / "infobatch-pretrain" / "named.txt"


def _path(name: str) -> str:
    return str(Path(name).expanduser().resolve())


def _named() -> set[str]:
    said = {_path(name) for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name}
    with suppress(OSError, UnicodeDecodeError):
        said |= {*_list().read_text().splitlines()}
    return said


def note(name: str) -> None:
    """Remember that a file of code was named on a command line."""
    if _path(name) not in _named():
        with suppress(OSError):  # without a home it holds for this command alone
            _list().parent.mkdir(parents=True, exist_ok=True)
            with _list().open("a") as file:
                file.write(f"{_path(name)}\n")


def check(name: str, flag: str, source: str) -> None:
    """Let a file of code pass that a file of settings names.

    Args:
        name: its path.
        flag: of the command line, that would name it.
        source: the file of settings.

    Raises:
        UserError: the user never named it.
    """
    if _path(name) not in _named():
        raise UserError(
            f"{source} names {_path(name)}, which is code that would be run; read it, and if it may, say so once: "
            f"{flag} {name} on the command line of a training, or {VARIABLE}={_path(name)} before any command"
        )
