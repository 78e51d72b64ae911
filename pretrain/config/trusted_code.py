"""A .py or TorchScript file is executed if the user has named it, not because a YAML file does.

A recipe or the folder of a run may come from anywhere. An adapter, model, policy or feature network that it names is
executed if it is part of this project, or a file that this user has named on a command line before and that has not
changed since.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from pretrain.core.errors import UserError
from pretrain.core.files import expand

VARIABLE = "PRETRAIN_TRUST"  # environment variable: further files, for one command


def _list_file() -> Path:
    folder = expand(os.environ.get("XDG_CONFIG_HOME") or "~/.config")
    if not folder.is_absolute():  # there is no home folder
        raise OSError(f"{folder} is not an absolute path")
    return folder / "infobatch-pretrain" / "named.txt"


def _path(name: str) -> str:
    return str(expand(name).resolve())


def file_hash(name: str) -> str:
    """SHA-256 of a file's content; "" if it can't be read."""
    with suppress(OSError), expand(name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    return ""


def _trusted() -> set[tuple[str, str]]:
    """(hash, path) of the files that were named on a command line."""
    with suppress(OSError, UnicodeDecodeError):
        lines = _list_file().read_text("utf-8", "surrogateescape").splitlines()
        return {(digest, path) for digest, _, path in (line.partition("  ") for line in lines)}
    return set()


def _from_environment() -> set[str]:
    return {_path(name) for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name}


def trust(name: str) -> None:
    """Store that a file, with its present content, was named on a command line."""
    entry = (file_hash(name), _path(name))
    if not entry[0] or entry in _trusted():
        return
    try:
        _list_file().parent.mkdir(parents=True, exist_ok=True)
        with _list_file().open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write("  ".join(entry) + "\n")
    except OSError:  # without a home directory it holds for this command only
        os.environ[VARIABLE] = os.pathsep.join([*filter(None, [os.environ.get(VARIABLE)]), _path(name)])


def features_file(name: str) -> str:
    """The path in the setting evaluate.features, which is PATH or NAME=PATH; of a name alone that name."""
    first, equals, rest = name.partition("=")
    return rest if equals and "/" not in first and not Path(name).is_file() else name


def trust_features(name: str) -> None:
    """Store that the file of a feature network was named on a command line, if it is one."""
    if Path(features_file(name)).is_file():
        trust(features_file(name))


def require_trust(name: str, flag: str, source: str) -> None:
    """Raise if the user never named a file that a YAML file names, or it has changed since.

    Args:
        name: path of the file.
        flag: by which a command line names it.
        source: the YAML file, or the setting in it.

    Raises:
        UserError: the user never named it as it is now.
    """
    path, trusted = _path(name), _trusted()
    if path in _from_environment() or (file_hash(name), path) in trusted:
        return
    changed = ", which has changed since you named it," if path in {each for _, each in trusted} else ","
    raise UserError(
        f"{source} names {path}{changed} whose code would be executed; read it, and if you trust it, give "
        f"{flag} {name} once on a command line, or {VARIABLE}={path} before any command"
    )
