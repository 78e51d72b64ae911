"""InfoBatch in Lightning: a callback that plans the epochs and has the training loader.

python examples/lightning_module.py
"""

from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor
from toy import data, learning_rate, network, report

from pretrain import InfoBatch
from pretrain.integrations.lightning import InfoBatchCallback


class Classifier(lightning.LightningModule):
    """A module whose loss InfoBatch weighs."""

    infobatch: InfoBatch  # set by the callback, before `configure_optimizers`

    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The weighted mean of a loss per sample."""
        index, features, label = batch
        return self.infobatch(F.cross_entropy(self.model(features), label, reduction="none"), index)

    def configure_optimizers(self) -> Any:
        """The learning rate is a function of progress: how many steps there will be is not known before."""
        optimizer = torch.optim.SGD(self.parameters(), learning_rate(0.0), momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda _: learning_rate(self.infobatch.progress) / learning_rate(0.0)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(epochs: int = 20, ckpt_path: str | None = None, callbacks: Any = (), **trainer: Any) -> Classifier:
    """Train a small classifier; `trainer` is Lightning's."""
    module, callback = Classifier(), InfoBatchCallback(data())
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    lightning.Trainer(
        accelerator="auto",
        max_epochs=epochs,
        callbacks=[callback, *callbacks],
        use_distributed_sampler=False,  # InfoBatch deals the samples to the processes itself
        reload_dataloaders_every_n_epochs=1,  # epochs have different numbers of batches
        **{**quiet, "enable_checkpointing": False, **trainer},
    ).fit(module, callback.loader(64), ckpt_path=ckpt_path)
    print(report(module.model.cpu(), module.infobatch.samples_used, epochs))
    return module


if __name__ == "__main__":
    main()
