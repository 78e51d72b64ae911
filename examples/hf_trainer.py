"""InfoBatch in Hugging Face's Trainer: its losses per sample are all that is added.

python examples/hf_trainer.py
python examples/hf_trainer.py --folder runs/hf --resume     # from the newest checkpoint there, also inside an epoch
"""

from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from toy import data, learning_rate, network, report
from transformers import TrainingArguments

from pretrain.integrations.transformers import InfoBatchTrainer


class Classifier(InfoBatchTrainer):
    """For a model without the interface of transformers; those with labels and logits need no subclass."""

    def sample_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """One loss per sample, and the outputs."""
        logits = model(inputs["features"])
        return F.cross_entropy(logits, inputs["labels"], reduction="none"), logits


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch must be a dict."""
    features, labels = zip(*samples, strict=True)
    return {"features": torch.stack(features), "labels": torch.stack(labels)}


def main(epochs: int = 20, folder: str = "runs/hf", resume: bool = False) -> InfoBatchTrainer:
    """Train a small classifier."""
    model = network()
    arguments = TrainingArguments(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        lr_scheduler_type="linear",
        max_grad_norm=0.0,
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=0,
        use_cpu=not torch.cuda.is_available(),
    )
    optimizer = torch.optim.SGD(model.parameters(), learning_rate(0.0), momentum=0.9)
    trainer = Classifier(
        model, arguments, collate, train_dataset=data(), optimizers=(optimizer, None), infobatch={"prune_ratio": 0.5}
    )
    trainer.train(resume_from_checkpoint=resume)
    print(report(model.cpu(), trainer.infobatch.samples_used, epochs))
    return trainer


if __name__ == "__main__":
    tyro.cli(main)
