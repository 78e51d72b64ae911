"""The state of a run, as it is saved in and restored from checkpoints."""

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
from pretrain.config.trusted_code import file_hash
from pretrain.core.errors import UserError
from pretrain.data.sources import Source
from pretrain.infobatch.sampler import InfoBatch
from pretrain.training.nonfinite import NonFinite


@runtime_checkable
class Observer(Protocol):
    """An evaluator that also receives every batch of the training.

    Attributes:
        name: of its file in a checkpoint.
    """

    name: str

    def attach(self, model: nn.Module, device: torch.device) -> None:
        """Called once before the training, with the bare network and the device of the batches."""
        ...

    def observe(self, batch: Batch, progress: float) -> None:
        """Called after each forward pass, with its batch and the progress of the training after it."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors for a checkpoint; called on all ranks."""
        ...

    def load_state_dict(self, state: dict[str, Tensor], progress: float) -> None:
        """Continue from a `state_dict`, at this progress of the training."""
        ...


@dataclass
class TrainState:
    """Everything that changes during a run and is saved in its checkpoints.

    Attributes:
        model: the bare network.
        ema: moving averages of its parameters.
        optimizer: the bare optimizer.
        infobatch: the scores and the position in the data.
        nonfinite: samples that are excluded because their losses were not finite.
        scaler: GradScaler under fp16, else None.
        observers: evaluators that also receive every batch.
        source: the data set, which has the names of skipped images.
        fingerprints: of the data set, see `pretrain.data.fingerprint`.
        step: optimizer steps made.
        seconds: of training so far.
        flops: of a sample, and of one that Partial Forward Blocking blocks; optimizer steps excluded.
        times_used: int32 [N]; how often each sample was used in the epochs before this one.
    """

    model: nn.Module
    ema: EMACollection
    optimizer: torch.optim.Optimizer
    infobatch: InfoBatch
    nonfinite: NonFinite
    scaler: Any
    observers: Sequence[Observer]
    source: Source
    fingerprints: dict[str, Tensor]
    step: int = 0
    seconds: float = 0.0
    flops: tuple[int, int] = (0, 0)
    times_used: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.times_used = torch.zeros(self.infobatch.size, dtype=torch.int32)

    def count_samples(self) -> None:
        """Add the samples of the epoch that ends to `times_used`; the plan is the same on all ranks."""
        selected = self.infobatch.plan.selected
        self.times_used[slice(None) if selected is None else torch.from_numpy(selected)] += 1

    def state_dict(self, config: Config, metrics: int) -> storage.State:
        """The state for a checkpoint; all ranks must call it.

        Args:
            config: settings of the run; saved, too.
            metrics: length of metrics.jsonl in bytes; a resumed run truncates the file to it.

        Returns:
            The state, not copied: it changes with the training.
        """
        self.infobatch.synchronize()
        source, ema = self.source, self.ema.state_dict()
        infobatch_tensors, infobatch_values = _split(self.infobatch.state_dict())
        moments, groups = storage.pack_optimizer(self.optimizer.state_dict())
        progress = ema.pop("progress")
        tensors: dict[str, dict[str, Tensor]] = {
            "model": self.model.state_dict(),
            **ema,
            "optimizer": moments,
            "infobatch": infobatch_tensors,
            "times_used": {"times_used": self.times_used},
            "data": self.fingerprints,
            **{observer.name: observer.state_dict() for observer in self.observers},
        }
        values = {
            "step": self.step,
            "seconds": self.seconds,
            "flops": [*self.flops],
            "progress": progress,
            "optimizer": groups,
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "infobatch": infobatch_values,
            "nonfinite": self.nonfinite.state_dict(),
            "metrics": metrics,
            "bad_images": sorted(source.train.skipped),
            "bad_heldout_images": sorted(source.test.skipped),
            "images": {
                "shape": source.shape,
                "classes": source.classes,
                "autoencoder": source.made_by,
                "subset": source.subset and source.subset.digest,
                "opened_by_program": source.report is None,
            },
            "code": code_hashes(config),
            "config": config.to_dict(),
        }
        return storage.State(tensors, values)

    def load_state_dict(self, state: storage.State, config: Config, path: Path) -> None:
        """Continue from the state of a checkpoint.

        Args:
            state: of the checkpoint; its values have the types of `storage.VALUE_TYPES`.
            config: settings of this run; `epochs` may differ from the checkpoint's.
            path: of the checkpoint, for error messages.

        Raises:
            UserError: it is of another model, adapter, data set, or other EMAs, or it lies inside an epoch that would
                have another plan now.
            ValueError, TypeError, RuntimeError: it is not the state of a run.
        """
        tensors, values = state.tensors, state.values
        _check_components(values["config"], config.to_dict(), path)
        size = len(tensors["infobatch"]["score"])
        if size != self.infobatch.size:
            raise UserError(
                f"--resume {path}: the checkpoint is of {size} images, --data has {self.infobatch.size} now"
            )
        storage.load_parameters(self.model, state.read("model", self.model.state_dict()), path)
        # If the run is given more epochs, the same training is a smaller share of it. Power-function EMAs depend on
        # ratios of progress only, so this does not change them.
        progress = values["progress"] * (values["config"]["epochs"] / config.epochs)
        layout = self.ema.state_dict()
        emas = {name: state.read(name, layout.get(name)) for name in tensors if name == "ema" or name[:4] == "ema-"}
        try:
            self.ema.load_state_dict({"progress": progress, **emas})
        except ValueError as error:
            raise UserError(f"--resume {path}: {error}") from None
        self._load_optimizer(state, values["optimizer"])
        used = tensors["times_used"]["times_used"]
        if used.shape != self.times_used.shape or (used < 0).any():
            raise ValueError("times_used is not one number for each image")
        self._load_infobatch(tensors["infobatch"], values["infobatch"], path)
        self.step, self.seconds = values["step"], values["seconds"]
        self.times_used = used.to(torch.int32)
        if self.scaler is not None and values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])
        self.source.train.skipped |= {*values["bad_images"]}
        self.source.test.skipped |= {*values["bad_heldout_images"]}
        self.nonfinite.load_state_dict(values["nonfinite"])
        for observer in self.observers:
            if observer.name in tensors:
                observer.load_state_dict(tensors[observer.name], self.infobatch.progress)

    def _load_optimizer(self, state: storage.State, groups: list[dict[str, Any]]) -> None:
        """Load the moments and the last learning rate; betas and weight decay are those of this run's settings."""
        own = self.optimizer.state_dict()["param_groups"]
        if [group["params"] for group in groups] != [group["params"] for group in own]:
            raise ValueError("the optimizer's groups have other parameters")
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        numbers = dict(zip((n for group in own for n in group["params"]), parameters, strict=True))
        moments = state.read(
            "optimizer", {name: numbers[int(name.split(".")[0])] for name in state.tensors["optimizer"]}
        )
        own = [group | {"lr": saved["lr"]} for group, saved in zip(own, groups, strict=True)]
        self.optimizer.load_state_dict(storage.unpack_optimizer(moments, own))
        for parameter, found in self.optimizer.state.items():
            shapes = {name: torch.Size() if name == "step" else parameter.shape for name in found}
            if wrong := [name for name, value in found.items() if value.shape != shapes[name]]:
                raise ValueError(f"the optimizer's {wrong[0]} does not have the shape of its parameter")

    def _load_infobatch(self, tensors: dict[str, Tensor], values: dict[str, Any], path: Path) -> None:
        for name, value in values.items():
            if not isinstance(value, int) or (value < 0 and name != "plan"):
                raise TypeError(f"{name} is {value!r}")
        try:
            self.infobatch.load_state_dict({**tensors, **values})
        except ValueError as error:
            raise UserError(f"--resume {path}: {error}") from None


def _split(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a state, and its other values."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def code_hashes(config: Config) -> dict[str, str]:
    """The hashes of the user's own files of code that the settings name, by path."""
    files = (config.adapter.name, config.model.name, config.policy)
    return {name: file_hash(name) for name in files if name.endswith(".py")}


def _without_folder(component: dict[str, Any]) -> dict[str, Any]:
    """The settings of a component whose file may have been moved."""
    return component | {"name": Path(component["name"]).name}


def _check_components(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Raise a `UserError` if the checkpoint has another model or adapter, or other settings of them."""
    for name in ("model", "adapter"):
        theirs, ours = _without_folder(saved[name]), _without_folder(now[name])
        if theirs.keys() != ours.keys() and theirs["name"] == ours["name"]:
            field = min(theirs.keys() ^ ours.keys())
            raise UserError(
                f"--resume {path}: {now[name]['name']} had other fields when the checkpoint was written ({field}); "
                "restore the file, or start another run"
            )
        if theirs != ours:
            differing = [key for key in ours | theirs if theirs.get(key) != ours.get(key)]  # the name is the first
            raise UserError(
                f"--resume {path}: the checkpoint is of another {name} ({name}.{differing[0]} is "
                f"{theirs.get(differing[0])!r} there, {ours.get(differing[0])!r} here); leave these settings out"
            )
