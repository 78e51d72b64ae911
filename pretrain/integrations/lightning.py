"""InfoBatch in Lightning.

class Module(lightning.LightningModule):
    def training_step(self, batch, _):
        index, image, label = batch                       # the index, then what data[i] has
        losses = F.cross_entropy(self.model(image), label, reduction="none")
        return self.infobatch(losses, index)

callback = InfoBatchCallback(data, prune_ratio=0.5)
trainer = lightning.Trainer(
    max_epochs=100, callbacks=[callback], reload_dataloaders_every_n_epochs=1, use_distributed_sampler=False
)
trainer.fit(Module(), callback.loader(256, num_workers=8))
"""

# Loaders of torch do not declare the type of their sampler.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, Sampler

from pretrain.infobatch.indexed import Indexed
from pretrain.infobatch.sampler import InfoBatch


class InfoBatchCallback(Callback):
    """Plans the epochs of a Lightning Trainer with InfoBatch; sets `module.infobatch`.

    InfoBatch's state is part of every checkpoint. A run that is resumed from one, inside an epoch too, uses exactly the
    samples that are left. An epoch is closed and the next one planned in `on_train_epoch_end`.

    Args:
        data: a map-style data set.
        settings: of `InfoBatch`, such as `policy`, `budget`, `prune_ratio` or `seed`; `epochs` is the Trainer's
            `max_epochs`.

    Attributes:
        infobatch: the `InfoBatch` of the current `fit`.
    """

    infobatch: InfoBatch

    def __init__(self, data: Any, **settings: Any) -> None:
        self.data, self.settings = data, settings
        self._batch_size, self._drop_last = 1, False
        self._state_batch: int | None = None  # samples of a step in the checkpoint, if that lies inside an epoch

    def loader(self, batch_size: int, **options: Any) -> DataLoader[Any]:
        """The training loader, for `Trainer.fit`, or for `train_dataloader` to return.

        Args:
            batch_size: samples of a step and process.
            options: of `DataLoader`, such as `num_workers` and `drop_last`; `sampler` and `shuffle` are InfoBatch's.

        Returns:
            A loader of ``(index, *data[i])``.
        """
        self._batch_size, self._drop_last = batch_size, bool(options.get("drop_last"))
        return _Loader(Indexed(self.data), batch_size, sampler=_Sampler(self), **options)

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Make InfoBatch, where the processes know of each other.

        Raises:
            ValueError: the Trainer's settings contradict InfoBatch.
        """
        if stage != "fit":
            return
        epochs, every = trainer.max_epochs, trainer.reload_dataloaders_every_n_epochs
        if epochs is None or epochs < 1:
            raise ValueError(f"InfoBatch plans a known number of epochs, got max_epochs {epochs}; set it, 1 or more")
        if every != 1:
            raise ValueError(
                "each epoch of InfoBatch has another number of batches, which Lightning counts when it reloads the "
                f"loader, got reload_dataloaders_every_n_epochs {every}; set it to 1"
            )
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                "Lightning would shard InfoBatch's samples a second time, got use_distributed_sampler True; set it to "
                "False"
            )
        if trainer.overfit_batches:
            raise ValueError(
                f"overfit_batches replaces InfoBatch's sampler, got {trainer.overfit_batches}; set it to 0 and give "
                "InfoBatchCallback a Subset of the data"
            )
        self.infobatch = InfoBatch(self.data, epochs=epochs, **self.settings)
        pl_module.infobatch = self.infobatch  # type: ignore[assignment]
        self._start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close an epoch whose last batch was the last thing before a checkpoint: Lightning continues after it."""
        infobatch, step = self.infobatch, self._batch_size * self.infobatch.world
        if trainer.global_step and not infobatch.samples_used:
            raise ValueError(
                f"the Trainer continues after step {trainer.global_step} and the checkpoint has no state of InfoBatch; "
                "resume from one that was written with InfoBatchCallback, or start a new run"
            )
        if self._state_batch is not None and self._state_batch != step:
            raise ValueError(
                f"the checkpoint lies inside an epoch of {self._state_batch} samples a step over all processes, got "
                f"{step}; resume with as many, or from a checkpoint at the end of an epoch"
            )
        self._state_batch = None
        if infobatch.seen and infobatch.epoch < trainer.current_epoch:
            self._next_epoch()
            current = trainer.fit_loop.epoch_loop.batch_progress.current  # compared with the new epoch's batches
            current.completed = max(current.completed, self._batches)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the epoch and plan the next, before Lightning writes a checkpoint."""
        if self.infobatch.epoch <= trainer.current_epoch:  # else a resumed run ends an epoch that had ended
            self._next_epoch()

    def state_dict(self) -> dict[str, Any]:
        """InfoBatch's state; all ranks call it."""
        if not hasattr(self, "infobatch"):
            return {}
        self.infobatch.synchronize()
        return {"infobatch": self.infobatch.state_dict(), "step": self._batch_size * self.infobatch.world}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, where the Trainer trains."""
        if not hasattr(self, "infobatch"):
            return
        self.infobatch.load_state_dict(state_dict["infobatch"])
        self._state_batch = state_dict["step"] if self.infobatch.seen else None
        self._start()

    def _start(self) -> None:
        self._plans, self._batches = self.infobatch.epochs(), 1
        self._next_epoch()

    def _next_epoch(self) -> None:
        """Close the epoch, if one was planned, plan the next, and count its batches on this rank."""
        if next(self._plans, None) is not None:
            samples = math.ceil(self.infobatch.length / self.infobatch.world)
            self._batches = samples // self._batch_size if self._drop_last else math.ceil(samples / self._batch_size)


class _Sampler(Sampler[int]):
    """The callback's InfoBatch, which is made after the loader."""

    def __init__(self, callback: InfoBatchCallback) -> None:
        self.callback = callback

    def __len__(self) -> int:
        return len(self.callback.infobatch)

    def __iter__(self) -> Iterator[int]:
        return iter(self.callback.infobatch)


class _Loader(DataLoader[Any]):
    """A loader whose length is that of the whole epoch, also after a resume: Lightning counts from its start.

    Its state is empty because the callback has InfoBatch's; without one Lightning warns that a resume is unreliable.
    """

    def __len__(self) -> int:
        sampler: Any = self.sampler
        return sampler.callback._batches

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing."""
