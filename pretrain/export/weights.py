"""Files of weights: those to start from, the names in them, what is said when they don't fit; and one of a network."""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.checkpoint import storage
from pretrain.core.errors import UserError, warn
from pretrain.core.text import listed

IN_FOLDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # DDP, compile, FSDP
AVERAGED = re.compile(r"(^|[._])(teacher|ema|target)([._]|$)")
SECOND = re.compile(r"(^|[._])(student|momentum|online|encoder_k)([._]|$)")
LISTED = 8  # names in a message


class Found(NamedTuple):
    """Weights that were read.

    Attributes:
        tensors: by the names in the file.
        folder: with the files that describe them: config.json, or state.json of a run's checkpoint.
        kind: what they are, for a message; "" if only the file says that.
    """

    tensors: dict[str, Tensor]
    folder: Path
    kind: str = ""


def read_weights(path: Path, in_folder: Sequence[str] = IN_FOLDER) -> Found:
    """Read the weights that a user named.

    Args:
        path: .safetensors, a file that `torch.load` reads with weights_only=True, the .index.json of several, a folder
            that holds one of these, a run's folder or one of its checkpoints, of which the EMA is taken.
        in_folder: the names that are looked for in a folder, in this order.

    Raises:
        UserError: there are none, or they can't be read.
    """
    shard = re.search(r"-\d{5}-of-(\d{5})\.", path.name)
    if shard and int(shard[1]) > 1:
        raise UserError(f"it is one of {int(shard[1])} files of a model; give their .index.json")
    if path.is_dir():
        if (checkpoint := _checkpoint(path)) is not None:
            for newer, why in checkpoint.skipped.items():
                warn(f"{newer.name} is not used: {why}; using {checkpoint.path.name}")
            with storage.restoring(checkpoint):
                tensors = checkpoint.state.read("ema")
            return Found(tensors, checkpoint.path, f"the EMA of {checkpoint.path.name}")
        path = next((path / name for name in in_folder if (path / name).is_file()), path)
    if not path.is_file():
        raise UserError(f"there is no {in_folder[0]} in this folder" if path.is_dir() else "there is no such file")
    return Found(_read(path), path.parent)


def _checkpoint(folder: Path) -> storage.FoundCheckpoint | None:
    if (folder / "checkpoints").is_dir():
        return storage.newest_whole(folder / "checkpoints")
    if (folder / "state.json").is_file():
        return storage.FoundCheckpoint(folder, storage.load(folder), {})
    return None


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of the files that an index names, by name; nested names are joined by dots."""
    if not path.is_file():
        raise UserError(f"there is no {path.name} beside the index that names it")
    if path.name.endswith(".index.json"):
        files = read_object(path).get("weight_map", {})
        names = {*files.values()} if isinstance(files, dict) else set()
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise UserError("it names no files of weights beside it")
        return {name: value for file in sorted(names) for name, value in _read(path.parent / file).items()}
    start = b""
    try:
        with path.open("rb") as file:  # whose name does not matter
            start = file.read(64)
            file.seek(0)
            if start[8:9] == b"{":  # the header of safetensors
                return load_file(path)
            with torch.serialization.safe_globals([argparse.Namespace]):  # published MAEs contain their arguments
                found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # readers of broken files raise exceptions of any type
        raise UserError(
            f"it can't be read as tensors ({_cause(start, error)}); give a .safetensors file, or a .pth file of "
            "tensors alone"
        ) from None
    tensors = dict(_flat(found, ""))
    if not tensors:
        raise UserError("it holds no named tensors; give the state dict of a model")
    return tensors


def _cause(start: bytes, error: Exception) -> str:
    """Why a file that starts with these bytes could not be read; torch's own messages advise to trust it."""
    if not start and not isinstance(error, OSError):
        return "it is empty"
    for begin, what in ((b"version https://git-lfs", "it is a Git LFS pointer"), (b"<", "it is a web page")):
        if start.startswith(begin):
            return what
    message = " ".join(str(error).split())
    if "weights_only" in message or "Weights only" in message:
        return "it is of another format, or holds Python objects or code, which are not loaded"
    return f"{type(error).__name__}: {message[:160]}"


def _flat(tree: object, prefix: str) -> Iterable[tuple[str, Tensor]]:
    if isinstance(tree, Tensor) and prefix:
        yield prefix, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no file, or something else in it.

    Raises:
        UserError: it is no JSON.
    """
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: can't be read: {error}; repair it or move it away") from None
    return found if isinstance(found, dict) else {}


def without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Names in a file by the names without what DDP, torch.compile and FSDP add."""
    return {".".join(part for part in name.split(".") if part not in WRAPPERS): name for name in names}


def preference(name: str) -> tuple[int, int]:
    """Sorts the networks in a file, given by their prefixes: the one that is used elsewhere comes first.

    A teacher, an EMA or a target encoder (DINO, timm, I-JEPA), then the one with the shortest name, last a student or
    the momentum encoder of MoCo.
    """
    if AVERAGED.search(name):
        return 0, len(name)
    return (2 if SECOND.search(name) else 1), len(name)


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise a `UserError` if a tensor's values are not finite floating-point numbers."""
    for name, value in tensors.items():
        if not value.is_floating_point() or not value.isfinite().all():
            kind = "values that are not finite" if value.is_floating_point() else f"{value.dtype} values"
            raise UserError(f"its {name} has {kind}; give weights of floating-point numbers, all finite")


def shape_text(tensor: Tensor | None) -> str:
    """A shape, for a message: 3x4."""
    return "missing" if tensor is None else "x".join(map(str, tensor.shape)) or "a number"


def differences(there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> str:
    """The names whose shapes differ, with the shapes; "" if none does."""
    names = [name for name in (*here, *there) if name not in there or name not in here]
    names += [name for name in here if name in there and here[name].shape != there[name].shape]
    names = [*dict.fromkeys(names)]
    shapes = [(name, shape_text(there.get(name)), shape_text(here.get(name))) for name in names]
    return listed([f"{name} ({in_file} in the file, {now} here)" for name, in_file, now in shapes], LISTED)


def summarise_names(names: Iterable[str], beside: str = "") -> str:
    """Names, grouped by the first component in which they differ from `beside`: head (2 tensors), mask_token."""
    count: Counter[str] = Counter()
    for name in names:
        parts, others = name.split("."), beside.split(".")
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(parts, others, strict=False)))
        count[".".join(parts[: same + 1])] += 1
    return listed([start if n == 1 else f"{start} ({n} tensors)" for start, n in count.items()], LISTED)


def parameters_alone(model: nn.Module, folder: Path) -> str:
    """Write the state dict of a network that no library has.

    Args:
        model: the network.
        folder: where to write.

    Returns:
        A Python expression that reads it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    storage.write(folder / "model.safetensors", dict(model.state_dict()), {"format": "pt"})
    return f"safetensors.torch.load_file({str(folder / 'model.safetensors')!r})"
