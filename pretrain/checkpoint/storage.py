"""Checkpoints: safetensors and JSON, written beside and renamed, so that one is whole or not there.

Neither format notices a flipped bit; the manifest beside them does, and a checkpoint that differs from it is not used.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.checkpoint.manifest import NAME, Damaged, seal, verify
from pretrain.core.errors import UserError
from pretrain.core.files import fsync

PREFIX = "step-"
PART, OLD, GONE = ".part", ".old", ".gone"  # being written; about to be replaced; being removed


class State(NamedTuple):
    """All that the rest of a run depends on."""

    tensors: dict[str, dict[str, Tensor]]  # by file: model, average, optimizer, infobatch
    values: dict[str, Any]  # plain JSON

    def copied(self) -> "State":
        """The state as it is now, on the CPU."""
        tensors = {file: copied(group) for file, group in self.tensors.items()}
        return State(tensors, json.loads(json.dumps(self.values)))


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


class Found(NamedTuple):
    """A checkpoint that is whole."""

    path: Path
    state: State
    skipped: dict[Path, str]  # newer ones, and why they are of no use


def _all(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; of two of one step, the one that was to replace the other last."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.suffix in ("", OLD) and _step(path) is not None]
    return sorted(found, key=lambda path: (_step(path), path.suffix != OLD))


def _step(path: Path) -> int | None:
    number = path.stem.removeprefix(PREFIX)
    return int(number) if number.isascii() and number.isdigit() else None


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder of them; nobody has looked into it."""
    return next(reversed(_all(folder)), None)


def newest_whole(folder: Path) -> Found | None:
    """The newest checkpoint in a folder of them that is as it was written; None if there are no checkpoints.

    Raises:
        UserError: there are some, and all of them are damaged.
    """
    skipped: dict[Path, str] = {}
    for path in reversed(_all(folder)):
        try:
            return Found(path, load(path), skipped | {part: "it was not written to its end" for part in _parts(folder)})
        except UserError as refusal:
            skipped[path] = str(refusal).removeprefix(f"{path}: ")
    if not skipped:
        return None
    raise UserError(
        f"{folder}: all {len(skipped)} checkpoints are damaged: "
        + "; ".join(f"{path.name}: {why}" for path, why in skipped.items())
        + "; put a good copy of one there, or start anew with --overwrite"
    )


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{PREFIX}*{PART}"))


def save(folder: Path, step: int, state: State, keep: int, hours: float | None = None) -> Path:
    """Write `folder`/step-N, and remove those that are not kept, and any of a later step (of another past).

    Args:
        folder: of the checkpoints.
        step: optimizer steps made.
        state: what is saved; with the "seconds" of training among its values.
        keep: newest ones that are kept.
        hours: beside them the first of every so many hours of training is kept.

    Raises:
        OSError: it can't be written; those that were there are untouched.
    """
    path = folder / f"{PREFIX}{step:08d}"
    part = path.with_suffix(PART)
    try:
        folder.mkdir(exist_ok=True)  # its parent is the run's, and not made anew if somebody took it away
        for rest in (*_parts(folder), *folder.glob(f"{PREFIX}*{GONE}")):
            shutil.rmtree(rest, ignore_errors=True)
        _room(folder, state)
        part.mkdir()
        for name, tensors in state.tensors.items():
            save_file(tensors, part / f"{name}.safetensors")
        (part / "state.json").write_text(json.dumps(state.values))
        seal(part, step=step, seconds=state.values["seconds"])
        if path.exists():  # of this step already: at no time is there none
            shutil.rmtree(path.with_suffix(OLD), ignore_errors=True)
            path.rename(path.with_suffix(OLD))
        part.rename(path)
        fsync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OSError(f"{path} can't be written: {said}") from None
    _remove(folder, path, keep, hours)
    return path


def _room(folder: Path, state: State) -> None:
    needed = sum(value.nbytes for tensors in state.tensors.values() for value in tensors.values())
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02 + 100_000:  # the rest is names, JSON and blocks that are not full
        raise OSError(f"it needs {needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB left")


def _remove(folder: Path, newest: Path, keep: int, hours: float | None) -> None:
    """Remove what is not kept. What fails here is tried again the next time."""
    step = _step(newest)
    earlier = [path for path in _all(folder) if (_step(path) or 0) < (step or 0)]
    kept = {newest, *earlier[len(earlier) - keep + 1 :]}
    if hours is not None:
        first: dict[int, Path] = {}
        for path in earlier:
            with suppress(OSError, ValueError, KeyError):
                seconds = json.loads((path / NAME).read_text())["seconds"]
                first.setdefault(int(seconds // (3600 * hours)), path)
        kept |= {*first.values()}
    for path in {*_all(folder)} - kept:
        with suppress(OSError):  # renamed first: half of a checkpoint must not be taken for a damaged one
            shutil.rmtree(path.rename(path.with_suffix(GONE)))


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they are now, on the CPU; none shares memory with another, which safetensors would refuse."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a file, and wait until they are on disk.

    Raises:
        OSError: it can't be written.
    """
    try:
        save_file(copied(tensors), file, metadata)
        fsync(file)
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from None


def load(path: Path) -> State:
    """Read a checkpoint.

    Raises:
        UserError: it is not one, or not as it was written.
    """
    if not path.is_dir():
        raise UserError(f"{path}: there is no checkpoint there")
    try:
        verify(path)
        values = json.loads((path / "state.json").read_text())
        return State({file.stem: load_file(file) for file in path.glob("*.safetensors")}, values)
    except (Damaged, OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None


VALUES: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "seconds": float,
    "progress": float,
    "optimizer": list,
    "infobatch": dict,
    "nan_guard": dict,
    "metrics": int,
    "bad_images": list,
    "bad_heldout_images": list,
    "images": dict,
    "config": dict,
}  # that a run's state has


@contextmanager
def restoring(found: Found | None) -> Iterator[None]:
    """For going by a checkpoint, if there is one; what was not written by a run is refused, whatever it leads to.

    Raises:
        UserError: a value is missing or of another type, or something in here fails.
    """
    if found is None:
        yield
        return
    values = found.state.values
    try:
        for name, kind in VALUES.items():
            if not isinstance(values[name], kind) or (kind is int and values[name] < 0):
                raise TypeError(f"{name} is {values[name]!r}")
        if not all(isinstance(name, str) for name in values["bad_images"]):
            raise TypeError("bad_images are not names")
        yield
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"{found.path}: not the state of a run ({type(error).__name__}: {said[:200]}); go on from another "
            "checkpoint, --resume PATH, or start anew"
        ) from None


def fill(model: torch.nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load a network's parameters.

    Raises:
        UserError: they are of another network.
    """
    own = model.state_dict()
    wrong = sorted(own.keys() ^ tensors.keys()) or [k for k, v in own.items() if v.shape != tensors[k].shape]
    if wrong:
        raise UserError(
            f"--resume {path}: the checkpoint is of another model ({wrong[0]} and {len(wrong) - 1} more tensors "
            "differ); resume with the settings it was trained with"
        )
    model.load_state_dict(tensors)
