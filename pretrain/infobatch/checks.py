"""Checks of what a training loop passes to InfoBatch: indices, losses and states."""

# torch does not declare all types of tolist, split and from_numpy.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Callers may ignore the types.
# pyright: reportUnnecessaryIsInstance=false

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def as_index(index: Tensor | Sequence[int]) -> Tensor:
    """The indices as int64 [B].

    Raises:
        ValueError: they are not integers, one for each sample.
    """
    try:
        found = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        got = found.dtype if isinstance(index, Tensor) else type(index).__name__
        raise ValueError(f"index must be integers, got {got}; does the loader read Indexed(data)?")
    if found.ndim != 1:
        raise ValueError(f"index must have one axis, that of the batch, got shape {tuple(found.shape)}")
    return found.long()


def check_losses(loss: Tensor, index: Tensor, score: Tensor | None) -> None:
    """Raise if there is not one loss, and one score, for each index.

    Raises:
        ValueError: they are no floating-point tensors of the shape of `index`, int64 [B].
    """
    for name, values in (("losses", loss), ("scores", score)):
        if values is None and name == "scores":
            continue
        if not isinstance(values, Tensor) or not values.is_floating_point():
            got = f"a tensor of {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"{name} must be a floating-point tensor, one per sample, got {got}")
        if values.shape != index.shape:
            raise ValueError(
                f"InfoBatch needs one loss per sample: got {name} of shape {tuple(values.shape)} for indices of "
                f"shape {tuple(index.shape)}; use reduction='none' and average over all axes but the first"
            )


def check_rank(made: tuple[int, int], now: tuple[int, int]) -> None:
    """Raise if a process has another rank or number of processes than when InfoBatch was made.

    Raises:
        ValueError: the process group was initialized in between.
    """
    if made != now:
        raise ValueError(
            f"InfoBatch was made for rank {made[0]} of {made[1]}, and this is rank {now[0]} of {now[1]}; make it after "
            "torch.distributed.init_process_group, or pass rank and world"
        )


def check_agreement(plan: int, merge: Callable[[Tensor], Tensor]) -> None:
    """Raise on all ranks if not all have the same plan; all ranks must call it.

    Args:
        plan: a hash of this rank's plan, in [0, 2^63).
        merge: element-wise maximum over all ranks.

    Raises:
        ValueError: they have different plans.
    """
    largest, smallest = merge(torch.tensor([plan, -plan])).tolist()
    if largest != -smallest:
        raise ValueError(
            "the ranks have planned different epochs; give InfoBatch the same data, seed, epochs, policy and settings "
            "on all of them, and load the same state"
        )


def checked_state(
    state: Mapping[str, Any], like: Mapping[str, Any], epochs: int, warn: Callable[[str], Any] | None = None
) -> dict[str, Any]:
    """A state for `InfoBatch.load_state_dict`, with numbers as int and tables as tensors.

    Args:
        state: as read from a checkpoint.
        like: what `state_dict` of the same InfoBatch returns now.
        epochs: of the run.
        warn: called with a message if the state lies before `like` in the same epoch; None: that is on purpose.

    Raises:
        ValueError: it is none, is of a data set of another size, or lies beyond the last epoch.
    """
    needed = [name for name in like if name != "weights"]
    missing = [name for name in needed if not isinstance(state, Mapping) or name not in state]
    if missing:
        raise ValueError(
            f"this is not what InfoBatch.state_dict() returns: {', '.join(missing)} is missing; pass load_state_dict "
            "that part of the checkpoint"
        )
    if state.get("weights") != like.get("weights"):
        found_with = "without weights of samples" if state.get("weights") is None else "with other weights of samples"
        raise ValueError(
            f"the state is of a run {found_with}; pass InfoBatch the argument `weights` that it began with"
        )
    found: dict[str, Any] = {}
    for name, own in ((name, like[name]) for name in needed):
        try:
            table = torch.as_tensor(state[name])
            found[name] = table.to(own.device, own.dtype) if isinstance(own, Tensor) else type(own)(table.item())
            damaged = not isinstance(own, Tensor) and table.is_floating_point()
        except (TypeError, ValueError, RuntimeError):
            damaged = True
        if damaged:
            raise ValueError(f"the state is damaged: {name} can't be {' '.join(str(state[name]).split())[:40]}")
    size, there = len(like["score"]), len(found["score"]) if found["score"].ndim else 0
    if there != size:
        raise ValueError(f"the state is of {there} samples, the data set has {size}")
    shapes = {name: like[name].shape for name in ("score", "levels", "reliability")}
    shapes["loss"] = torch.Size([size if found["seen"] else 0])
    wrong = [name for name, shape in shapes.items() if found[name].shape != shape]
    wrong += ["loss"] if found["loss"].isnan().any() else []
    wrong += ["score"] if found["score"].isinf().any() or (found["score"] < 0).any() else []  # NaN: no score yet
    wrong += [name for name in ("levels", "reliability") if not found[name].isfinite().all()]
    wrong += [name for name in ("epoch", "seen", "used_before", "dropped") if found[name] < 0]
    if wrong:
        raise ValueError(f"the state is damaged: {', '.join(wrong)} can't be those of an InfoBatch")
    if found["epoch"] + bool(found["seen"]) > epochs:
        raise ValueError(
            f"the state is of epoch {found['epoch'] + bool(found['seen'])}, and the run has {epochs}; continue with at "
            "least as many epochs"
        )
    if warn and found["epoch"] == like["epoch"] and found["seen"] < like["seen"]:
        warn(
            f"InfoBatch was restored to {like['seen']} samples of epoch {like['epoch']} and is now set back to "
            f"{found['seen']} without a step in between; torchdata's StatefulDataLoader with workers does that: give "
            "it the sampler StatefulSampler(infobatch) of pretrain.integrations.torchdata"
        )
    return found
