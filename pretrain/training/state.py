"""All that a run changes as it goes, as one thing that is saved and restored."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.checkpoint import storage
from pretrain.checkpoint.ema import EMACollection
from pretrain.config.schema import Config
from pretrain.core.errors import UserError
from pretrain.infobatch.epoch_losses import UNSEEN
from pretrain.infobatch.sampler import InfoBatch


@dataclass
class TrainState:
    """What a checkpoint holds.

    Attributes:
        model: the bare network.
        averages: of its parameters.
        optimizer: the bare optimizer.
        infobatch: scores and position.
        scaler: of the gradients under fp16, else None.
        step: optimizer steps made.
        seconds: spent on them.
        visits: int32 [N]; of each sample, in the epochs that are over.
    """

    model: nn.Module
    averages: EMACollection
    optimizer: torch.optim.Optimizer
    infobatch: InfoBatch
    scaler: Any
    step: int = 0
    seconds: float = 0.0
    visits: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.visits = torch.zeros(self.infobatch.size, dtype=torch.int32)

    def count_visits(self) -> None:
        """Count those of the epoch that ends: a plan is the same on all ranks."""
        kept = self.infobatch.plan.kept
        self.visits[slice(None) if kept is None else torch.from_numpy(kept)] += 1

    def state(self, config: Config, journal: int, bad_images: list[str]) -> storage.State:
        """Everything, not copied, and beside it config, journal position and bad images; call it on all ranks."""
        memory = self.infobatch.state_dict()
        moments, groups = storage.pack_optimizer(self.optimizer.state_dict())
        tensors: dict[str, dict[str, Tensor]] = {
            "model": self.model.state_dict(),
            **{name: average.model.state_dict() for name, average in self.averages.all().items()},
            "optimizer": moments,
            "infobatch": {name: value for name, value in memory.items() if isinstance(value, Tensor)},
            "visits": {"visits": self.visits},
        }
        values = {
            "step": self.step,
            "seconds": self.seconds,
            "progress": self.averages.progress,
            "optimizer": groups,
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "infobatch": {name: value for name, value in memory.items() if not isinstance(value, Tensor)},
            "journal": journal,
            "bad_images": bad_images,
            "config": config.to_dict(),
        }
        return storage.State(tensors, values)

    def restore(self, state: storage.State, config: Config, path: Path) -> None:
        """Go on from a state.

        Raises:
            UserError: it is of another model, adapter or data set.
        """
        tensors, values = state
        for name in ("model", "adapter"):
            theirs, ours = values["config"][name], config.to_dict()[name]
            if theirs != ours:
                differing = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
                raise UserError(
                    f"--resume {path}: the checkpoint is of another {name} ({name}.{differing[0]} is "
                    f"{theirs.get(differing[0])!r} there, {ours.get(differing[0])!r} here); leave these settings out"
                )
        size = len(tensors["infobatch"]["score"])
        if size != self.infobatch.size:
            raise UserError(
                f"--resume {path}: the checkpoint is of {size} images, --data has {self.infobatch.size} now"
            )
        storage.fill(self.model, tensors["model"], path)
        averages = self.averages.all()
        if {name for name in tensors if name.startswith("average")} != averages.keys():
            lengths = " ".join(sorted(name[len("average-") :] for name in tensors if "average-" in name)) or "none"
            raise UserError(f"--resume {path}: the checkpoint's --average.lengths are {lengths}; leave the setting out")
        for name, average in averages.items():
            storage.fill(average.model, tensors[name], path)
        self.optimizer.load_state_dict(storage.unpack_optimizer(tensors["optimizer"], values["optimizer"]))
        for parameter, moments in self.optimizer.state.items():
            if wrong := [name for name, value in moments.items() if value.shape not in (parameter.shape, ())]:
                raise ValueError(f"the optimizer's {wrong[0]} is not of its parameter's shape")
        if tensors["visits"]["visits"].shape != self.visits.shape:
            raise ValueError("visits are not one number for each image")
        for name, value in values["infobatch"].items():
            if not isinstance(value, int) or (value < 0 and name != "plan"):
                raise TypeError(f"{name} is {value!r}")
        memory = self.infobatch
        try:
            memory.load_state_dict({**tensors["infobatch"], **values["infobatch"]})
            ahead = memory.plan.at(np.arange(memory.seen, memory.length)) if memory.seen else []
            if (memory.ledger.loss[ahead] != UNSEEN).any():
                raise ValueError("it has losses of samples that are yet to be visited")
        except ValueError as error:
            raise UserError(f"--resume {path}: {error}") from None
        self.step, self.seconds = values["step"], values["seconds"]
        self.visits = tensors["visits"]["visits"].to(torch.int32)
        # A run that is given more epochs has its clock set back; what a power average weighs does not notice.
        self.averages.progress = values["progress"] * (values["config"]["epochs"] / config.epochs)
        if self.scaler is not None and values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])
