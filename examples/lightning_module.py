"""InfoBatch in Lightning, with evaluation after each epoch and checkpoints inside epochs.

python examples/lightning_module.py
python examples/lightning_module.py --resume                    # from the newest checkpoint in --folder
python examples/lightning_module.py --devices 2                 # several GPUs, or processes on the CPU
"""

from typing import Any, Literal

import lightning
import torch
import torch.nn.functional as F
import tyro
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader
from toy import data, learning_rate, network, report

from pretrain import InfoBatch
from pretrain.integrations.lightning import InfoBatchCallback


class Classifier(lightning.LightningModule):
    """A module whose loss InfoBatch weighs."""

    infobatch: InfoBatch  # set by the callback, before `configure_optimizers`

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The weighted mean of a loss per sample."""
        index, features, label = batch
        return self.infobatch(F.cross_entropy(self.net(features), label, reduction="none"), index)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """The mean loss of new points."""
        features, label = batch
        self.log("validation_loss", F.cross_entropy(self.net(features), label), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """The learning rate is a function of progress: how many steps there will be is not known before."""
        optimizer = torch.optim.SGD(self.parameters(), learning_rate(0.0), momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1 - self.infobatch.progress)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(
    epochs: int = 20,
    folder: str = "runs/lightning",
    resume: bool = False,
    batch_size: int = 64,
    devices: int | Literal["auto"] = "auto",
    **arguments: Any,
) -> Classifier:
    """Train a small classifier.

    Args:
        epochs: passes over the data.
        folder: of the checkpoints.
        resume: continue from the newest checkpoint there.
        batch_size: samples of a step and device.
        devices: GPUs, or processes where there is none.
        arguments: more of Lightning's Trainer.
    """
    module, callback = Classifier(), InfoBatchCallback(data(), prune_ratio=0.5)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        devices=devices,
        callbacks=[callback, ModelCheckpoint(folder, every_n_train_steps=5, save_last=True)],
        use_distributed_sampler=False,  # InfoBatch deals the samples to the processes itself
        reload_dataloaders_every_n_epochs=1,  # epochs have different numbers of batches
        **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False, **arguments},
    )
    evaluation = DataLoader(data(seed=1), 256)
    trainer.fit(module, callback.loader(batch_size), evaluation, ckpt_path="last" if resume else None)
    if trainer.is_global_zero:
        print(f"validation loss {trainer.callback_metrics['validation_loss']:.3f}")
        print(report(module.net.cpu(), module.infobatch.samples_used, epochs))
    return module


if __name__ == "__main__":
    tyro.cli(main)
