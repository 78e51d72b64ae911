"""Checkpoints: a folder of safetensors and JSON files and a manifest.

Sharded tensors are in files `shard-*`, one per process; the others in a file for each group of them.

A checkpoint is written under another name and renamed when it is complete, so it exists completely or not at all. Its
manifest has a hash of each file; a checkpoint that differs from its manifest is not used.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from pretrain.checkpoint import shards
from pretrain.checkpoint.manifest import NAME, Damaged, describe, verify, write_manifest
from pretrain.core.errors import UserError
from pretrain.core.files import atomic_write, fsync, own_folder, read_json, usual_mode
from pretrain.distributed.collectives import all_gather_set, raise_on_all_ranks, rank_and_world_size
from pretrain.distributed.sharding import place

PREFIX = "step-"
PART, OLD, GONE = ".part", ".old", ".gone"  # suffixes: being written; being replaced; being removed


class State(NamedTuple):
    """The state of a run: everything that its continuation depends on.

    Attributes:
        tensors: by group (model, ema, optimizer, infobatch, ...) and name; sharded ones that were loaded are on the
            meta device until `read`.
        values: all others, plain JSON; their names and types are `VALUE_TYPES`.
        folder: with the sharded tensors, if the state was loaded and has any.
    """

    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]
    folder: Path | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether it has sharded tensors in memory."""
        return any(isinstance(value, DTensor) for named in self.tensors.values() for value in named.values())

    def read(self, group: str, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The tensors of a group; those whose name and shape a tensor of `like` has in its layout, others whole."""
        layout = like or {}
        found = self.tensors[group]
        same = {name for name, value in found.items() if name in layout and layout[name].shape == value.shape}
        if self.folder is None or not any(value.is_meta for value in found.values()):
            return {name: place(value, layout[name]) if name in same else value for name, value in found.items()}
        tensors = {
            name: torch.empty_like(layout[name]) if name in same else torch.empty_like(value, device="cpu")
            for name, value in found.items()
        }
        shards.read(self.folder, group, tensors)
        return tensors

    def copied(self) -> "State":
        """A copy on the CPU."""
        tensors = {file: copied(group) for file, group in self.tensors.items()}
        return State(tensors, json.loads(json.dumps(self.values)))


def pack_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The tensors of an optimizer's `state_dict`, by "{number of the parameter}.{name}", and its parameter groups."""
    tensors = {f"{p}.{name}": value for p, values in state["state"].items() for name, value in values.items()}
    return tensors, state["param_groups"]


def unpack_optimizer(tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The inverse of `pack_optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, _, field = name.partition(".")
        state.setdefault(int(parameter), {})[field] = value
    return {"state": state, "param_groups": groups}


class FoundCheckpoint(NamedTuple):
    """An undamaged checkpoint.

    Attributes:
        path: its folder.
        state: its content.
        skipped: the newer checkpoints that were not used, and why.
    """

    path: Path
    state: State
    skipped: dict[Path, str]


def _all(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; of two of the same step, the replacement last."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.suffix in ("", OLD) and _step(path) is not None]
    return sorted(found, key=lambda path: (_step(path), path.suffix != OLD))


def _step(path: Path) -> int | None:
    number = path.stem.removeprefix(PREFIX)
    return int(number) if number.isascii() and number.isdigit() else None


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder of checkpoints, unverified; None if there is none."""
    return next(reversed(_all(folder)), None)


def newest_whole(folder: Path) -> FoundCheckpoint | None:
    """The newest undamaged checkpoint in a folder of checkpoints; None if the folder has no checkpoints.

    Raises:
        UserError: all checkpoints are damaged.
    """
    skipped: dict[Path, str] = {}
    for path in reversed(_all(folder)):
        try:
            incomplete = {part: "it was not written completely" for part in _parts(folder)}
            return FoundCheckpoint(path, load(path), skipped | incomplete)
        except UserError as error:
            skipped[path] = str(error).removeprefix(f"{path}: ")
    if not skipped:
        return None
    raise UserError(
        f"{folder}: all {len(skipped)} checkpoints are damaged: "
        + "; ".join(f"{path.name}: {why}" for path, why in skipped.items())
        + "; restore one of them from a backup, or start again with --overwrite"
    )


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{PREFIX}*{PART}"))


def save(folder: Path, step: int, state: State, keep: int, hours: float | None = None) -> Path:
    """Write the checkpoint `folder`/step-N and remove the checkpoints that are not kept.

    Checkpoints of later steps are removed, too: they are left over from before a resume.

    Args:
        folder: of the checkpoints.
        step: optimizer steps made.
        state: to save; its values include the "seconds" of training.
        keep: number of newest checkpoints that are kept.
        hours: additionally keep the first checkpoint of each period of this many hours of training.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it can't be written; the other checkpoints are unchanged.
    """
    path = folder / f"{PREFIX}{step:08d}"
    try:
        part = _begin(path, state)
        _finish(part, state, state.tensors, {})
    except (OSError, SafetensorError) as error:
        raise _failure(path, error) from None
    _remove(folder, path, keep, hours)
    return path


def save_sharded(folder: Path, step: int, state: State, keep: int, hours: float | None = None) -> Path:
    """`save` for a state with sharded tensors; all ranks call it, on a file system that they share.

    Each rank writes and hashes its own tensors; rank 0 writes everything else.
    """
    path, main = folder / f"{PREFIX}{step:08d}", rank_and_world_size()[0] == 0
    part = path.with_suffix(PART)
    split = {group: named for group, named in state.tensors.items() if State({group: named}, {}).is_sharded}
    try:
        with raise_on_all_ranks(), _as_user_error():
            if main:
                _begin(path, state)
        shards.write(part, split)
        rank, world = rank_and_world_size()
        hashes = {(file.name, *describe(file)) for file in shards.files(part)[rank::world]}
        known = {name: (size, digest) for name, size, digest in all_gather_set(hashes)}
        with raise_on_all_ranks(), _as_user_error():
            if main:
                whole = {group: copied(named) for group, named in state.tensors.items() if group not in split}
                _finish(part, state, whole, known)
    except (OSError, UserError) as error:
        if main:
            raise _failure(path, error) from None
        raise OSError(f"{path} can't be written: {error}") from None
    if main:
        _remove(folder, path, keep, hours)
    return path


@contextmanager
def _as_user_error() -> Iterator[None]:
    """Errors of writing as errors that `raise_on_all_ranks` raises on all ranks."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(_reason(error)) from None


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _failure(path: Path, error: Exception) -> OSError:
    """Remove what was written of a checkpoint, and say why it is incomplete."""
    shutil.rmtree(path.with_suffix(PART), ignore_errors=True)
    return OSError(f"{path} can't be written: {_reason(error)}")


def _begin(path: Path, state: State) -> Path:
    """Make the folder that becomes the checkpoint `path`."""
    folder, part = path.parent, path.with_suffix(PART)
    own_folder(folder)  # without its parent: a run's folder that was removed is not made again
    for rest in (*_parts(folder), *folder.glob(f"{PREFIX}*{GONE}")):
        shutil.rmtree(rest, ignore_errors=True)
    _check_free_space(folder, state)
    part.mkdir()
    return part


def _finish(part: Path, state: State, tensors: shards.Groups, known: Mapping[str, tuple[int, str]]) -> None:
    """Write groups of whole tensors, the values and the manifest, and rename the folder to a checkpoint."""
    for name, group in tensors.items():
        save_file(group, part / f"{name}.safetensors")
    (part / "state.json").write_text(json.dumps(state.values))
    usual_mode(part)
    write_manifest(part, known, step=state.values["step"], seconds=state.values["seconds"])
    path = part.with_suffix("")
    if path.exists():  # renamed, not removed: at every moment one of the two is there
        shutil.rmtree(path.with_suffix(OLD), ignore_errors=True)
        path.rename(path.with_suffix(OLD))
    part.rename(path)
    fsync(path.parent)


def _check_free_space(folder: Path, state: State) -> None:
    needed = sum(value.nbytes for tensors in state.tensors.values() for value in tensors.values())
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02 + 100_000:  # beside tensors: names, JSON, partly filled blocks
        raise OSError(f"it needs {needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB left")


def _remove(folder: Path, newest: Path, keep: int, hours: float | None) -> None:
    """Remove the checkpoints that are not kept. A failure is ignored; the next save tries again."""
    step = _step(newest)
    earlier = [path for path in _all(folder) if (_step(path) or 0) < (step or 0)]
    kept = {newest, *earlier[max(len(earlier) - keep + 1, 0) :]}
    if hours is not None:
        first: dict[int, Path] = {}
        for path in earlier:
            with suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
                seconds = read_json(path / NAME)["seconds"]
                first.setdefault(int(seconds // (3600 * hours)), path)
        kept |= {*first.values()}
    for path in {*_all(folder)} - kept:
        with suppress(OSError):  # renamed first, so that a half-removed checkpoint does not count as a damaged one
            shutil.rmtree(path.rename(path.with_suffix(GONE)))


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU; contiguous and without shared memory, as safetensors requires."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, which is whole or absent, and wait until they are on disk.

    Raises:
        OSError: it can't be written.
    """
    try:
        with atomic_write(file) as part:
            save_file(copied(tensors), part, metadata)
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from None


def load(path: Path) -> State:
    """Read a checkpoint.

    Raises:
        UserError: there is none at `path`, or it is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path}: there is no checkpoint there")
    try:
        names = verify(path)
        values = read_json(path / "state.json")
        step = values.get("step") if isinstance(values, dict) else None
        if _step(path) not in (None, step):
            raise Damaged(f"it is the checkpoint of step {step} under the name of another one; rename it")
        split = {file.name for file in shards.files(path)} & {*names}
        whole = [name for name in names if name.endswith(".safetensors") and name not in split]
        tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in whole}
        return State(tensors | shards.describe(path), values, path) if split else State(tensors, values)
    except (Damaged, OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None


VALUE_TYPES: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "seconds": float,
    "flops": list,
    "progress": float,
    "optimizer": list,
    "infobatch": dict,
    "nonfinite": dict,
    "metrics": int,
    "bad_images": list,
    "bad_heldout_images": list,
    "images": dict,
    "config": dict,
    "code": dict,
}  # of `State.values`


@contextmanager
def restoring(found: FoundCheckpoint | None) -> Iterator[None]:
    """A context for code that reads the state of a checkpoint: an error in it becomes a `UserError`.

    A file that has a valid manifest may still have any content. Nothing happens if `found` is None.

    Raises:
        UserError: a value of the state is missing or has the wrong type, or the code raised an exception.
    """
    if found is None:
        yield
        return
    values = found.state.values
    try:
        for name, kind in VALUE_TYPES.items():
            if not isinstance(values[name], kind) or (kind in (int, float) and not 0 <= values[name] < math.inf):
                raise TypeError(f"{name} is {values[name]!r}")
        if not all(isinstance(name, str) for name in values["bad_images"]):
            raise TypeError("bad_images are not names")
        yield
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        message = " ".join(str(error).split())
        raise UserError(
            f"{found.path}: not the state of a run ({type(error).__name__}: {message[:200]}); resume from another "
            "checkpoint, --resume PATH, or start again"
        ) from None


def load_parameters(model: torch.nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load parameters and buffers into a network.

    Args:
        model: the bare network.
        tensors: by name, as in the network's `state_dict`.
        path: of the checkpoint, for the error message.

    Raises:
        UserError: names or shapes are those of another network.
    """
    own = model.state_dict()
    wrong = sorted(own.keys() ^ tensors.keys()) or [k for k, v in own.items() if v.shape != tensors[k].shape]
    if wrong:
        raise UserError(
            f"--resume {path}: the checkpoint is of another model ({wrong[0]} and {len(wrong) - 1} more tensors "
            "differ); resume with the settings it was trained with"
        )
    model.load_state_dict(tensors)
