"""InfoBatch in Hugging Face's Trainer: a subclass of a few lines.

python examples/hf_trainer.py
"""

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toy import data, network, rate, report
from transformers import Trainer, TrainerCallback, TrainingArguments

from pretrain import Indexed, InfoBatch


class InfoBatchTrainer(Trainer):
    """A Trainer whose epochs InfoBatch plans.

    The Trainer asks for the loader's length once, before the first epoch, and makes at most as many steps in every
    epoch: plan the first epoch with a policy that visits everybody in it, as all but `random` do. It counts batches of
    `gradient_accumulation_steps` in the first epoch's way too, so leave that at 1.
    """

    def __init__(self, *arguments: Any, infobatch: InfoBatch, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.infobatch, self.plans = infobatch, infobatch.epochs()
        next(self.plans)
        self.add_callback(NextPlan(self))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Not prepared by accelerate, which would deal the samples to the processes once more."""
        return DataLoader(Indexed(self.train_dataset), self._train_batch_size, sampler=self.infobatch)

    def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **more: Any) -> Any:
        """The weighted mean of a loss per sample; evaluation is not weighted."""
        index, features, label = inputs
        losses = F.cross_entropy(model(features), label, reduction="none")
        return self.infobatch(losses, index) if model.training else losses.mean()

    def _prepare_inputs(self, inputs: Any) -> list[Tensor]:
        return [part.to(self.args.device) for part in inputs]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The rate is a function of progress: how many steps there will be is not known before."""
        peak = rate(0.0)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda _: rate(self.infobatch.progress) / peak
        )
        return self.lr_scheduler


class NextPlan(TrainerCallback):
    """SampleRNG the plan of every epoch but the first before its loader is iterated, and closes the last."""

    def __init__(self, trainer: InfoBatchTrainer) -> None:
        self.trainer = trainer

    def on_epoch_end(self, *_: Any, **more: Any) -> None:
        """The next epoch's plan needs this one's losses."""
        next(self.trainer.plans, None)


def main(epochs: int = 20) -> InfoBatchTrainer:
    """Train a small classifier."""
    samples, model = data(), network()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            max_grad_norm=0.0,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        optimizer = torch.optim.SGD(model.parameters(), rate(0.0), momentum=0.9)
        trainer = InfoBatchTrainer(
            model,
            arguments,
            train_dataset=samples,
            optimizers=(optimizer, None),
            infobatch=InfoBatch(samples, epochs=epochs),
        )
        trainer.train()
    print(report(model.cpu(), trainer.infobatch.samples_used, epochs))
    return trainer


if __name__ == "__main__":
    tyro.cli(main)
