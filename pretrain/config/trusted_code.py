"""A .py or TorchScript file is executed if the user has named it, not because a YAML file does.

A recipe or the folder of a run may come from anywhere. An adapter, model, policy or feature network that it names is
executed if it is part of this project, or a file that this user has named on a command line before.
"""

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


def _trusted() -> set[str]:
    paths = {_path(name) for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name}
    with suppress(OSError, UnicodeDecodeError):
        paths |= {*_list_file().read_text().splitlines()}
    return paths


def trust(name: str) -> None:
    """Store that a file was named on a command line."""
    if _path(name) not in _trusted():
        with suppress(OSError):  # without a home directory it holds for this command only
            _list_file().parent.mkdir(parents=True, exist_ok=True)
            with _list_file().open("a") as file:
                file.write(f"{_path(name)}\n")


def trust_features(name: str) -> None:
    """Store that the file of a feature network, PATH or NAME=PATH, was named on a command line."""
    if Path(path := name.rpartition("=")[2]).is_file():
        trust(path)


def require_trust(name: str, flag: str, source: str) -> None:
    """Raise if the user never named a file that a YAML file names.

    Args:
        name: path of the file.
        flag: by which a command line names it.
        source: the YAML file, or the setting in it.

    Raises:
        UserError: the user never named it.
    """
    if _path(name) not in _trusted():
        raise UserError(
            f"{source} names {_path(name)}, whose code would be executed; read it, and if you trust it, give "
            f"{flag} {name} once on a command line, or {VARIABLE}={_path(name)} before any command"
        )
