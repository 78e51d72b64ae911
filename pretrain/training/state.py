"""All that a run changes as it goes, as one thing that is saved and restored."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pretrain.adapters import Batch
from pretrain.checkpoint import storage
from pretrain.checkpoint.ema import EMACollection
from pretrain.config.schema import Config
from pretrain.core.errors import UserError
from pretrain.data.sources import Source
from pretrain.infobatch.sampler import InfoBatch
from pretrain.training.nan_guard import NanGuard


@runtime_checkable
class Observer(Protocol):
    """An evaluator that also follows the training: the loop tells it of every batch.

    Attributes:
        name: of its file in a checkpoint.
    """

    name: str

    def attach(self, model: nn.Module, device: torch.device) -> None:
        """Called once with the bare network, before the training."""
        ...

    def observe(self, batch: Batch, progress: float) -> None:
        """Called after each forward pass."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What a resume needs; called on all ranks."""
        ...

    def load_state_dict(self, state: dict[str, Tensor], progress: float) -> None:
        """Go on from a `state_dict`."""
        ...


@dataclass
class TrainState:
    """What a checkpoint holds.

    Attributes:
        model: the bare network.
        ema: averages of its parameters.
        optimizer: the bare optimizer.
        infobatch: scores and position.
        nan_guard: samples that are left out because their losses were not finite.
        scaler: of the gradients under fp16, else None.
        observers: evaluators that follow the training.
        source: the data; the names of bad images are part of the state.
        fingerprints: of the data, see `pretrain.data.fingerprint`.
        step: optimizer steps made.
        seconds: spent on them.
        visits: int32 [N]; how often each sample was used, in the epochs that are over.
    """

    model: nn.Module
    ema: EMACollection
    optimizer: torch.optim.Optimizer
    infobatch: InfoBatch
    nan_guard: NanGuard
    scaler: Any
    observers: Sequence[Observer]
    source: Source
    fingerprints: dict[str, Tensor]
    step: int = 0
    seconds: float = 0.0
    visits: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.visits = torch.zeros(self.infobatch.size, dtype=torch.int32)

    def count_visits(self) -> None:
        """Count those of the epoch that ends: a plan is the same on all ranks."""
        kept = self.infobatch.plan.selected
        self.visits[slice(None) if kept is None else torch.from_numpy(kept)] += 1

    def state_dict(self, config: Config, metrics: int) -> storage.State:
        """Everything, not copied; call it on all ranks.

        Args:
            config: the run's settings, kept beside it.
            metrics: length in bytes of the log of metrics that belongs to it.
        """
        self.infobatch.synchronize()
        scheduler, source = self.infobatch.state_dict(), self.source
        moments, groups = storage.pack_optimizer(self.optimizer.state_dict())
        tensors: dict[str, dict[str, Tensor]] = {
            "model": self.model.state_dict(),
            **{name: ema.model.state_dict() for name, ema in self.ema.all().items()},
            "optimizer": moments,
            "infobatch": {name: value for name, value in scheduler.items() if isinstance(value, Tensor)},
            "visits": {"visits": self.visits},
            "data": self.fingerprints,
            **{observer.name: observer.state_dict() for observer in self.observers},
        }
        values = {
            "step": self.step,
            "seconds": self.seconds,
            "progress": self.ema.progress,
            "optimizer": groups,
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "infobatch": {name: value for name, value in scheduler.items() if not isinstance(value, Tensor)},
            "nan_guard": self.nan_guard.state_dict(),
            "metrics": metrics,
            "bad_images": sorted(source.train.skipped),
            "bad_heldout_images": sorted(source.test.skipped),
            "images": {"shape": source.shape, "classes": source.classes, "autoencoder": source.made_by},
            "config": config.to_dict(),
        }
        return storage.State(tensors, values)

    def load_state_dict(self, state: storage.State, config: Config, path: Path) -> None:
        """Go on from the state of the checkpoint `path`.

        Raises:
            UserError: it is of another model, adapter or data set.
        """
        tensors, values = state
        _same_components(values["config"], config.to_dict(), path)
        size = len(tensors["infobatch"]["score"])
        if size != self.infobatch.size:
            raise UserError(
                f"--resume {path}: the checkpoint is of {size} images, --data has {self.infobatch.size} now"
            )
        storage.fill(self.model, tensors["model"], path)
        self._load_ema(tensors, path)
        self._load_optimizer(tensors["optimizer"], values["optimizer"])
        if tensors["visits"]["visits"].shape != self.visits.shape:
            raise ValueError("visits are not one number for each image")
        self._load_infobatch(tensors["infobatch"], values["infobatch"], path)
        self.step, self.seconds = values["step"], values["seconds"]
        self.visits = tensors["visits"]["visits"].to(torch.int32)
        # A run that is given more epochs has its clock set back; what a power average weighs does not notice.
        self.ema.progress = values["progress"] * (values["config"]["epochs"] / config.epochs)
        if self.scaler is not None and values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])
        self.source.train.skipped |= {*values["bad_images"]}
        self.source.test.skipped |= {*values["bad_heldout_images"]}
        self.nan_guard.load_state_dict(values["nan_guard"])
        for observer in self.observers:
            if observer.name in tensors:
                observer.load_state_dict(tensors[observer.name], self.infobatch.progress)

    def _load_ema(self, tensors: dict[str, dict[str, Tensor]], path: Path) -> None:
        own = self.ema.all()
        if {name for name in tensors if name == "ema" or name.startswith("ema-")} != own.keys():
            lengths = " ".join(sorted(name.removeprefix("ema-") for name in tensors if "ema-" in name)) or "none"
            raise UserError(f"--resume {path}: the checkpoint's --ema.sigma-rel are {lengths}; leave the setting out")
        for name, ema in own.items():
            storage.fill(ema.model, tensors[name], path)

    def _load_optimizer(self, moments: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
        self.optimizer.load_state_dict(storage.unpack_optimizer(moments, groups))
        for parameter, own in self.optimizer.state.items():
            if wrong := [name for name, value in own.items() if value.shape not in (parameter.shape, ())]:
                raise ValueError(f"the optimizer's {wrong[0]} is not of its parameter's shape")

    def _load_infobatch(self, tensors: dict[str, Tensor], values: dict[str, Any], path: Path) -> None:
        for name, value in values.items():
            if not isinstance(value, int) or (value < 0 and name != "plan"):
                raise TypeError(f"{name} is {value!r}")
        infobatch = self.infobatch
        try:
            infobatch.load_state_dict({**tensors, **values})
        except ValueError as error:
            raise UserError(f"--resume {path}: {error}") from None


def _same_components(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    for name in ("model", "adapter"):
        theirs, ours = saved[name], now[name]
        if theirs != ours:
            differing = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
            raise UserError(
                f"--resume {path}: the checkpoint is of another {name} ({name}.{differing[0]} is "
                f"{theirs.get(differing[0])!r} there, {ours.get(differing[0])!r} here); leave these settings out"
            )
