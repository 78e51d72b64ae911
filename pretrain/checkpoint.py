"""Checkpoints: safetensors and JSON, written beside and renamed, so that one is whole or not there."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.errors import Refused

PREFIX = "step-"


class State(NamedTuple):
    """All that the rest of a run depends on."""

    tensors: dict[str, dict[str, Tensor]]  # by file: model, average, optimizer, infobatch
    values: dict[str, Any]  # plain JSON


def pack_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's `state_dict` as named tensors and plain values."""
    tensors = {f"{p}.{name}": value for p, values in state["state"].items() for name, value in values.items()}
    return tensors, state["param_groups"]


def unpack_optimizer(tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The inverse of `pack_optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, _, field = name.partition(".")
        state.setdefault(int(parameter), {})[field] = value
    return {"state": state, "param_groups": groups}


def _all(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.suffix != ".part" and (path / "state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder of them."""
    return next(reversed(_all(folder)), None)


def save(folder: Path, step: int, state: State, keep: int) -> Path:
    """Write `folder`/step-N and remove all but the newest `keep`, and any of a later step (of another past)."""
    path = folder / f"{PREFIX}{step:08d}"
    part = path.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, tensors in state.tensors.items():
        write(part / f"{name}.safetensors", tensors)
    (part / "state.json").write_text(json.dumps(state.values))
    sync(part / "state.json")
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)
    sync(folder)
    every = _all(folder)
    others = [other for other in every if other != path and int(other.name.removeprefix(PREFIX)) < step]
    for other in {*every} - {path, *others[len(others) - keep + 1 :]}:
        shutil.rmtree(other)
    return path


def write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a file, and wait until they are on disk."""
    # Copies: safetensors refuses tensors that share memory.
    save_file({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}, file, metadata)
    sync(file)


def load(path: Path) -> State:
    """Read a checkpoint.

    Raises:
        Refused: it is not one, or not whole.
    """
    if not (path / "state.json").is_file():
        raise Refused(f"--resume {path}: there is no checkpoint there")
    try:
        values = json.loads((path / "state.json").read_text())
        return State({file.stem: load_file(file) for file in path.glob("*.safetensors")}, values)
    except (OSError, ValueError, SafetensorError) as error:
        raise Refused(f"--resume {path}: the checkpoint can't be read: {error}") from None


def fill(model: torch.nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load a network's parameters.

    Raises:
        Refused: they are of another network.
    """
    own = model.state_dict()
    wrong = sorted(own.keys() ^ tensors.keys()) or [k for k, v in own.items() if v.shape != tensors[k].shape]
    if wrong:
        raise Refused(
            f"--resume {path}: the checkpoint is of another model ({wrong[0]} and {len(wrong) - 1} more tensors "
            "differ); resume with the settings it was trained with"
        )
    model.load_state_dict(tensors)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's names, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
