"""InfoBatch in Hugging Face's Trainer, by a small subclass.

python examples/hf_trainer.py
"""

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toy import data, learning_rate, network, report
from transformers import Trainer, TrainerCallback, TrainingArguments

from pretrain import Indexed, InfoBatch


class InfoBatchTrainer(Trainer):
    """A Trainer whose samples InfoBatch selects.

    The Trainer reads the loader's length once, before the first epoch, and takes at most so many steps in every epoch.
    So the policy must use all samples in the first epoch, as all but `random` do. For the same reason
    `gradient_accumulation_steps` must be 1.
    """

    def __init__(self, *arguments: Any, infobatch: InfoBatch, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.infobatch, self.epochs = infobatch, infobatch.epochs()
        next(self.epochs)
        self.add_callback(NextEpoch(self))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """A loader that accelerate does not prepare, because it would shard the samples a second time."""
        return DataLoader(Indexed(self.train_dataset), self._train_batch_size, sampler=self.infobatch)

    def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **more: Any) -> Any:
        """The weighted mean loss in training, the mean loss in evaluation."""
        index, features, label = inputs
        losses = F.cross_entropy(model(features), label, reduction="none")
        return self.infobatch(losses, index) if model.training else losses.mean()

    def _prepare_inputs(self, inputs: Any) -> list[Tensor]:
        return [tensor.to(self.args.device) for tensor in inputs]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A learning rate as a function of progress, because the number of steps is not known in advance."""
        peak = learning_rate(0.0)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda _: learning_rate(self.infobatch.progress) / peak
        )
        return self.lr_scheduler


class NextEpoch(TrainerCallback):
    """Ends InfoBatch's epoch and plans the next one, before the Trainer iterates over the loader again."""

    def __init__(self, trainer: InfoBatchTrainer) -> None:
        self.trainer = trainer

    def on_epoch_end(self, *_: Any, **more: Any) -> None:
        """The plan of the next epoch depends on the losses of this one."""
        next(self.trainer.epochs, None)


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
        optimizer = torch.optim.SGD(model.parameters(), learning_rate(0.0), momentum=0.9)
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
