"""InfoBatch in Lightning: the module gives the Trainer a new loader in every epoch.

python examples/lightning_module.py
"""

from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from toy import data, learning_rate, network, report

from pretrain import Indexed, InfoBatch


class Pruned(lightning.LightningModule):
    """A classifier whose samples InfoBatch selects."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.model, self.samples = network(), data()
        self.epochs = epochs

    def setup(self, stage: str) -> None:
        """Make InfoBatch here, where the process group is initialized."""
        self.infobatch = InfoBatch(self.samples, epochs=self.epochs)
        self.plans = self.infobatch.epochs()
        self.planned = False

    def train_dataloader(self) -> DataLoader[Any]:
        """Lightning calls this before every epoch, and after it has loaded a checkpoint."""
        if not self.planned:
            next(self.plans)
            self.planned = True
        return DataLoader(Indexed(self.samples), 64, sampler=self.infobatch)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The weighted mean loss."""
        index, features, label = batch
        return self.infobatch(F.cross_entropy(self.model(features), label, reduction="none"), index)

    def on_train_batch_start(self, *_: Any) -> None:
        """Set the learning rate, a function of progress."""
        self.optimizers().param_groups[0]["lr"] = learning_rate(self.infobatch.progress)

    def on_train_epoch_end(self) -> None:
        """End InfoBatch's epoch and plan the next one, before Lightning writes a checkpoint."""
        if self.infobatch.epoch + 1 < self.epochs:
            next(self.plans)

    def teardown(self, stage: str) -> None:
        """End the last epoch; before that Lightning still uses the length of the loader."""
        if self.infobatch.seen:
            next(self.plans, None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), learning_rate(0.0), momentum=0.9)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save InfoBatch's scores and position."""
        checkpoint["infobatch"] = self.infobatch.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore them."""
        self.infobatch.load_state_dict(checkpoint["infobatch"])


def main(epochs: int = 20, ckpt_path: str | None = None, **trainer: Any) -> Pruned:
    """Train a small classifier.

    Args:
        epochs: passes over the data.
        ckpt_path: checkpoint of Lightning to continue from.
        trainer: further arguments of Lightning's Trainer.
    """
    module = Pruned(epochs)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    lightning.Trainer(
        accelerator="auto",
        max_epochs=epochs,
        use_distributed_sampler=False,  # InfoBatch divides the samples among the processes itself
        reload_dataloaders_every_n_epochs=1,
        **{**quiet, **trainer},
    ).fit(module, ckpt_path=ckpt_path)
    print(report(module.model.cpu(), module.infobatch.samples_used, epochs))
    return module


if __name__ == "__main__":
    main()
