"""InfoBatch in Hugging Face's Trainer, with evaluation after each epoch and checkpoints inside epochs.

python examples/hf_trainer.py
python examples/hf_trainer.py --resume                          # from the newest checkpoint in --folder
torchrun --standalone --nproc_per_node 2 examples/hf_trainer.py
"""

from typing import Any

import torch
import tyro
from torch import Tensor, nn
from toy import data, learning_rate, network, report
from transformers import TrainingArguments

from pretrain.integrations.transformers import InfoBatchTrainer


class Classifier(nn.Module):
    """With the interface of transformers' models; for another one override `InfoBatchTrainer.sample_losses`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The logits [B, CLASSES]; InfoBatchTrainer takes the cross entropy of each sample."""
        return {"logits": self.net(features)}


def rows(seed: int) -> list[dict[str, Tensor]]:
    """A data set of dicts, as those of the library datasets."""
    return [{"features": features, "labels": label} for features, label in data(seed)]


def main(epochs: int = 20, folder: str = "runs/hf", resume: bool = False, **arguments: Any) -> InfoBatchTrainer:
    """Train a small classifier.

    Args:
        epochs: passes over the data.
        folder: of the checkpoints.
        resume: continue from the newest checkpoint there.
        arguments: more of TrainingArguments.
    """
    model = Classifier()
    arguments = {"per_device_train_batch_size": 64, "max_grad_norm": 0.0, "seed": 0, "report_to": "none", **arguments}
    arguments |= {"eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 5, "save_total_limit": 1}
    arguments |= {"per_device_eval_batch_size": 256, "disable_tqdm": True, "use_cpu": not torch.cuda.is_available()}
    trainer = InfoBatchTrainer(
        model,
        TrainingArguments(folder, num_train_epochs=epochs, lr_scheduler_type="linear", **arguments),
        train_dataset=rows(seed=0),
        eval_dataset=rows(seed=1),
        optimizers=(torch.optim.SGD(model.parameters(), learning_rate(0.0), momentum=0.9), None),
        infobatch={"prune_ratio": 0.5},
    )
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        print(report(model.net.cpu(), trainer.infobatch.samples_used, epochs))
    return trainer


if __name__ == "__main__":
    tyro.cli(main)
