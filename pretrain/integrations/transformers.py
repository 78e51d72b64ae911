"""InfoBatch in Hugging Face's Trainer.

    trainer = InfoBatchTrainer(model, args, train_dataset=data, infobatch={"prune_ratio": 0.5})
    trainer.train(resume_from_checkpoint=checkpoint)    # at any step, also inside an epoch

Everything else is the Trainer's: evaluation, checkpoints, gradient accumulation, several processes, callbacks.
"""

# The Trainer declares few of its types, and the methods of it that are overridden here are not public.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportIncompatibleMethodOverride=false, reportPrivateUsage=false
# Callers may ignore the types.
# pyright: reportUnnecessaryIsInstance=false

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy, seed_worker

from pretrain.core.files import atomic_write
from pretrain.core.padding import sample_of
from pretrain.infobatch.indexed import length
from pretrain.infobatch.sampler import InfoBatch

FILE = "infobatch.pt"  # in a checkpoint's folder
OWN = {"epochs", "rank", "world"}  # settings of InfoBatch that the Trainer's arguments give
INDEX = "infobatch_index"  # of a batch
IGNORED = -100  # the label of a token that has no loss


class InfoBatchTrainer(Trainer):
    """A Trainer whose epochs InfoBatch plans.

    Each epoch uses the samples of InfoBatch's plan. A checkpoint also holds InfoBatch's state, and a resumed run uses
    exactly the samples that are left, inside an epoch too. The learning rate of `lr_scheduler_type` is a
    function of `infobatch.progress`; steps that the arguments count, such as `warmup_steps`, are those of a run that
    uses every sample. `state.epoch` is the epoch by InfoBatch's count.

    Args:
        arguments, more: those of `Trainer`. `train_dataset` is map-style, the batches of `data_collator` are dicts.
        infobatch: settings of `InfoBatch`, such as `policy`, `budget` or `prune_ratio`; `epochs` is
            `args.num_train_epochs`, the seed `args.data_seed` or `args.seed`.

    Attributes:
        infobatch: the `InfoBatch` of the current `train()`.

    Raises:
        ValueError: an argument of the Trainer contradicts InfoBatch.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the samples of the whole optimizer step

    def __init__(self, *arguments: Any, infobatch: Mapping[str, Any] | None = None, **more: Any) -> None:
        if more.get("train_dataset") is not None:
            length(more["train_dataset"])  # the Trainer's own message advises max_steps
        super().__init__(*arguments, **more)
        self.model_accepts_loss_kwargs = False  # no loss is divided by the number of tokens of a batch
        if self.args.max_steps > 0:
            raise ValueError(
                "InfoBatch plans epochs, whose number of steps is not known before, got max_steps "
                f"{self.args.max_steps}; set num_train_epochs"
            )
        if self.args.num_train_epochs != int(self.args.num_train_epochs):
            raise ValueError(f"num_train_epochs must be whole for InfoBatch, got {self.args.num_train_epochs}")
        if self.compute_loss_func is not None:
            raise ValueError(
                "InfoBatch needs one loss per sample and compute_loss_func returns their mean; override sample_losses"
            )
        order = getattr(self.args, "train_sampling_strategy", "random")
        if order != "random" or getattr(self.args, "group_by_length", False):
            raise ValueError(
                f"InfoBatch orders the samples itself, got train_sampling_strategy {order}; set it to random"
            )
        if infobatch is not None and (not isinstance(infobatch, Mapping) or OWN & infobatch.keys()):
            raise ValueError(
                f"infobatch must be a dict of settings without {', '.join(sorted(OWN))}, which are the Trainer's; got "
                f"{type(infobatch).__name__ if not isinstance(infobatch, Mapping) else sorted(infobatch)}"
            )
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._settings: dict[str, Any] = {"seed": seed, **(infobatch or {})}
        self._start(None)
        self.add_callback(_Epochs(self))

    def sample_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """One loss per sample; override it for a loss of your own.

        This one is for logits [B, C] with classes [B] (cross-entropy), with float labels [B, C] (binary cross-entropy),
        logits [B, 1] or [B] with float labels [B] (squared error), and logits [B, T, C] with labels [B, T]: the mean
        cross-entropy of a sample's tokens whose label is not -100, shifted by one if the model is a causal language
        model.

        Args:
            model: as the Trainer passes it, possibly wrapped.
            inputs: a batch of the collator, on the model's device.

        Returns:
            Losses [B], with their graph, and the model's outputs: a dict, a tuple or the logits.
        """
        if (labels := inputs.get("labels")) is None:
            raise ValueError(f"the batch has no labels, it has {', '.join(inputs)}; override sample_losses")
        keeps_labels = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        outputs = model(**(inputs if keeps_labels else {k: v for k, v in inputs.items() if k != "labels"}))
        logits = outputs if isinstance(outputs, Tensor) else outputs["logits" if isinstance(outputs, Mapping) else 0]
        return _losses(logits, labels, self._loss_shifts_labels, self.args.label_smoothing_factor), outputs

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """InfoBatch's weighted mean in training, this batch's part of the optimizer step's; else the plain mean."""
        inputs = dict(inputs)
        index = inputs.pop(INDEX, None)
        losses, outputs = self.sample_losses(model, inputs)
        if index is None:
            loss = losses.mean()
        else:
            share = self.infobatch.global_batch_size(index) / self._step_samples
            loss = share * self.infobatch(losses, index)
        if not return_outputs:
            return loss
        if isinstance(outputs, Mapping):
            return loss, outputs
        return loss, (loss, *outputs) if isinstance(outputs, tuple) else {"logits": outputs}

    # -- the loader --------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Not prepared by accelerate, which would shard the samples a second time."""
        data: Any = self.train_dataset
        collate = self.data_collator
        if hasattr(data, "remove_columns"):  # of the library datasets
            data = self._remove_unused_columns(data, description="Training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="Training")
        workers = self.args.dataloader_num_workers
        loader = _Loader(
            _WithIndex(data),
            self._train_batch_size,
            sampler=self.infobatch,
            collate_fn=_Collate(collate),
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            drop_last=self.args.dataloader_drop_last,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=self.args.process_index),
            generator=torch.Generator(),  # so that iterating draws nothing of the global one, which a resume restores
        )
        if not len(loader):
            raise ValueError(
                f"dataloader_drop_last leaves no batch of {self._train_batch_size} of {self.infobatch.size} samples on "
                f"{self.infobatch.world} processes; set it to False, or a smaller batch"
            )
        return loader

    def _batches_left(self) -> int:
        """Of this rank in this epoch; the same on every rank."""
        return _batches(len(self.infobatch), self._train_batch_size, self.args.dataloader_drop_last)

    # -- the loop ----------------------------------------------------------------------------------

    def _start(self, checkpoint: str | None) -> None:
        """Make InfoBatch, at the start or where a checkpoint was written, and plan its epoch."""
        self._step_samples = 0  # of the current optimizer step, over all ranks and accumulated batches
        args = self.args
        self.infobatch = InfoBatch(
            self.train_dataset,  # type: ignore[arg-type]  # None and iterable data sets are refused there
            epochs=int(args.num_train_epochs),
            rank=args.process_index,
            world=args.world_size,
            **self._settings,
        )
        if checkpoint is not None:
            file = Path(checkpoint) / FILE
            if not file.exists():
                raise FileNotFoundError(
                    f"{checkpoint} has no {FILE}, so it was not written by InfoBatchTrainer or with save_only_model; "
                    "resume from a checkpoint that has one, or start a new run"
                )
            try:
                state = torch.load(file, weights_only=True)
            except Exception as error:  # readers of broken files raise exceptions of any type
                raise ValueError(
                    f"{file} can't be read ({type(error).__name__}); resume from another checkpoint"
                ) from None
            self.infobatch.load_state_dict(state)
        self._plans = self.infobatch.epochs()
        next(self._plans, None)

    def _inner_training_loop(
        self, batch_size: int | None = None, args: Any = None, resume_from_checkpoint: str | None = None, **more: Any
    ) -> Any:
        self._start(resume_from_checkpoint)
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, **more)

    def _init_training_state(self, max_steps: int, num_update_steps_per_epoch: int, *more: Any) -> tuple[int, int]:
        """The epoch to continue with is InfoBatch's, and its sampler skips what was used."""
        super()._init_training_state(max_steps, num_update_steps_per_epoch, *more)
        left = self.infobatch.total_epochs - self.infobatch.epoch
        self.state.max_steps = self.state.global_step + left * num_update_steps_per_epoch  # at most
        return self.infobatch.epoch, 0

    def _run_epoch(self, **given: Any) -> None:
        """One epoch, of the steps that its plan has, or has left."""
        batches, accumulated = self._batches_left(), self.args.gradient_accumulation_steps
        loader: Any = given["train_dataloader"]
        if not isinstance(loader, _Loader) or loader.generator is None:
            raise ValueError("InfoBatch needs the loader of InfoBatchTrainer.get_train_dataloader; do not override it")
        if batches:
            loader.generator.manual_seed(self.args.seed + self.infobatch.samples_used)
            given |= {"steps_in_epoch": batches, "num_update_steps_per_epoch": math.ceil(batches / accumulated)}
            super()._run_epoch(**given)
            return
        # The checkpoint was written after the epoch's last step.
        self._load_rng_state(given["resume_from_checkpoint"])
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        names = ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time")
        self._maybe_log_save_evaluate(self._tr_loss, None, **{name: given[name] for name in names})

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's, as a function of `infobatch.progress` instead of the number of steps."""
        own = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if own and isinstance(scheduler, LambdaLR):

            def by_progress(factor: Callable[[Any], float]) -> Callable[[int], float]:
                return lambda _: factor(self.infobatch.progress * num_training_steps)

            scheduler.lr_lambdas = [by_progress(factor) for factor in scheduler.lr_lambdas]
        return scheduler

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """InfoBatch's state, too. All ranks call it."""
        self.infobatch.synchronize()
        state = self.infobatch.state_dict()
        if self.args.should_save:
            with atomic_write(Path(output_dir) / FILE) as file:
                torch.save(state, file)
        super()._save_optimizer_and_scheduler(output_dir)


class _Epochs(TrainerCallback):
    """What InfoBatch does between the Trainer's steps and epochs."""

    def __init__(self, trainer: InfoBatchTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, *_: Any, **more: Any) -> None:
        """Count the samples of this optimizer step, over all ranks and accumulated batches."""
        trainer, infobatch = self.trainer, self.trainer.infobatch
        batch = trainer._train_batch_size * infobatch.world
        batches = min(trainer.args.gradient_accumulation_steps, trainer._batches_left())
        trainer._step_samples = min(batches * batch, infobatch.length - infobatch.seen)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Correct the epoch, before it is logged or saved."""
        state.epoch = self.trainer.infobatch.progress * self.trainer.infobatch.total_epochs

    def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Close the epoch and plan the next, before the epoch's evaluation and checkpoint.

        An epoch in which the run was stopped stays open, so that a resumed run continues in it.
        """
        infobatch = self.trainer.infobatch
        if control.should_training_stop and self.trainer._batches_left():
            return
        next(self.trainer._plans, None)
        state.epoch = infobatch.progress * infobatch.total_epochs
        if infobatch.epoch == infobatch.total_epochs:  # where the Trainer would have reached max_steps
            control.should_save |= args.save_strategy == SaveStrategy.STEPS
            if args.eval_strategy == "steps" and state.global_step % state.eval_steps:
                control.should_evaluate |= args.eval_delay <= state.global_step


class _WithIndex(Dataset[tuple[int, Any]]):
    """Samples with the sampler's index in front."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.data[sample_of(index)]


class _Collate:
    """The user's collator, with the indices in the batch."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        batch = self.collate([sample for _, sample in rows])
        if not isinstance(batch, Mapping):
            raise TypeError(f"data_collator must return a dict for InfoBatchTrainer, got {type(batch).__name__}")
        return {**batch, INDEX: torch.tensor([index for index, _ in rows])}


class _Loader(DataLoader[Any]):
    """A loader whose length is that of an epoch with every sample: the Trainer asks once."""

    def __len__(self) -> int:
        infobatch: Any = self.sampler
        return _batches(math.ceil(infobatch.size / infobatch.world), self.batch_size or 1, self.drop_last)


def _batches(samples: int, batch_size: int, drop_last: bool) -> int:
    return samples // batch_size if drop_last else math.ceil(samples / batch_size)


def _losses(logits: Tensor, labels: Tensor, shift: bool, smoothing: float) -> Tensor:
    """Losses [B] of logits; see `InfoBatchTrainer.sample_losses`."""
    logits = logits.float()
    if labels.is_floating_point():
        if logits.shape == labels.shape and labels.ndim == 2:
            return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
        if logits.numel() == labels.numel() == len(labels):
            return (logits.flatten() - labels.flatten()).square()
    elif logits.ndim == labels.ndim + 1 and labels.ndim in (1, 2):
        if labels.ndim == 2 and shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        loss = F.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none", label_smoothing=smoothing
        )
        count = (labels != IGNORED).reshape(len(labels), -1).sum(1)
        return loss.view(len(labels), -1).sum(1) / count.clamp(min=1)
    raise ValueError(
        f"InfoBatchTrainer has no loss for logits of shape {tuple(logits.shape)} and {labels.dtype} labels of shape "
        f"{tuple(labels.shape)}; override sample_losses"
    )
