"""A .py file is executed if the user has named it, not because a YAML file does.

A recipe or the folder of a run may come from anywhere. An adapter, model or policy that it names is executed if it is
part of this project, or a file that this user has named on a command line before and that has not changed since.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from pretrain.core.errors import UserError

VARIABLE = "PRETRAIN_TRUST"  # environment variable: further files, for one command


def _list_file() -> Path:
    folder = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(folder).expanduser() / "infobatch-pretrain" / "named.txt"


def _path(name: str) -> str:
    return str(Path(name).expanduser().resolve())


def _hash(name: str) -> str:
    """SHA-256 of a file's content; "" if it can't be read."""
    with suppress(OSError), Path(name).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    return ""


def _trusted() -> set[tuple[str, str]]:
    """(hash, path) of the files that were named on a command line."""
    with suppress(OSError, UnicodeDecodeError):
        lines = _list_file().read_text().splitlines()
        return {(digest, path) for digest, _, path in (line.partition("  ") for line in lines)}
    return set()


def _from_environment() -> set[str]:
    return {_path(name) for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name}


def trust(name: str) -> None:
    """Store that a file, as it is now, was named on a command line."""
    entry = (_hash(name), _path(name))
    if entry[0] and entry not in _trusted():
        with suppress(OSError):  # without a home directory it holds for this command only
            _list_file().parent.mkdir(parents=True, exist_ok=True)
            with _list_file().open("a") as file:
                file.write("  ".join(entry) + "\n")


def require_trust(name: str, flag: str, source: str) -> None:
    """Raise if the user never named a file that a YAML file names, or it has changed since.

    Args:
        name: path of the .py file.
        flag: by which a command line names it.
        source: the YAML file.

    Raises:
        UserError: the user never named it as it is now.
    """
    path, trusted = _path(name), _trusted()
    if path in _from_environment() or (_hash(name), path) in trusted:
        return
    changed = " and has changed since you named it" if path in {each for _, each in trusted} else ""
    raise UserError(
        f"{source} names {path}, whose code would be executed{changed}; read it, and if you trust it, give "
        f"{flag} {name} once on the command line of a training, or {VARIABLE}={path} before any command"
    )
